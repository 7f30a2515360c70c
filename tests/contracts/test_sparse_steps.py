"""No registered architecture makes a tensor of batch x d_sae numbers where its codes are sparse."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sae.architectures import architecture, csr, list_architectures, matching_pursuit
from sae.core.base import SparseAutoencoder, TrainingState
from sae.core.batch import TrainingBatch
from sae.kernels import cpp_backend, screen, selection, torch_backend

ROWS, D_IN, D_SAE = 384, 16, 2048
CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in sorted(list_architectures())),
    ("topk", {"multi_topk_coefficient": 0.1}),
    ("batchtopk", {"auxiliary": "zipf"}),
    ("feature_choice", {"phase_one": 0.01, "auxiliary": "auxk"}),
    ("feature_choice", {"phase_one": 0.01, "auxiliary": "zipf"}),
    ("crosscoder", {"activation": "topk"}),
    ("crosscoder", {"activation": "batchtopk"}),
    ("transcoder", {"activation": "relu"}),
    ("transcoder", {"activation": "jumprelu", "pre_act_coefficient": 0.1}),
    ("skip_transcoder", {"activation": "jumprelu"}),
    ("matryoshka", {"aux_per_level": True}),
    ("jumprelu", {"pre_act_coefficient": 0.1, "parametrisation": "log"}),
    ("csr", {"positives": "class"}),
    ("temporal", {"unit_codes": False}),
    ("matching_pursuit", {"orthogonal": True}),
]
SMALL = {"archetypal": {"n_candidates": 8}, "msae": {"ks": (2, 4, 8)}}


class Largest(TorchDispatchMode):
    """Notes the numbers that the largest new tensor holds."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.by = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, Tensor) and each.layout == torch.strided:
                held = each.untyped_storage().nbytes() // each.element_size()
                if held > self.numbers:
                    self.numbers, self.by = held, str(func)
        return out


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks are far smaller than the whole, as they are of real shapes."""
    for module, name in [
        (torch_backend, "_CHUNK_ELEMENTS"),
        (selection, "_BLOCK_ELEMENTS"),
        (selection, "_SAMPLE_ELEMENTS"),
        (csr, "_CHUNK_ELEMENTS"),
        (matching_pursuit, "_CHUNK_ELEMENTS"),
        (cpp_backend, "_CHUNK_ELEMENTS"),
        (screen, "_CHUNK_ELEMENTS"),
    ]:
        assert getattr(module, name) <= 2**24
        monkeypatch.setattr(module, name, 2**14)
    monkeypatch.setattr(matching_pursuit, "_GRAM_WIDTH", 0)  # d_sae x d_sae, whatever the batch


def make(kind: str, options: dict[str, Any]) -> SparseAutoencoder:
    torch.manual_seed(0)
    cls = architecture(kind)
    names = {field.name for field in dataclasses.fields(cls.Config)}
    given = {"d_sae": D_SAE, **({"k": 4} if "k" in names else {}), **SMALL.get(kind, {}), **options}
    return cls(cls.Config(**given), D_IN, D_IN + 1 if cls.transcodes else None).train()


@torch.no_grad()
def start(sae: SparseAutoencoder, batch: TrainingBatch, underused: Tensor) -> None:
    """As at the start of a run, but with few features above their thresholds."""
    sae.start(batch)
    sae.W_dec.add_(0.01)
    if "underused" in dict(sae.named_buffers()):
        sae.get_buffer("underused").copy_(underused)
        return
    for name in ("b_enc", "b_gate"):
        if name in dict(sae.named_parameters()):
            sae.get_parameter(name).fill_(-2.5)


@pytest.mark.parametrize(("kind", "options"), CASES)
@pytest.mark.parametrize("dead", [4, D_SAE // 2])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_training_inference_and_calibration(
    kind: str, options: dict, dead: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAESCOPE_KERNELS", backend)
    sae = make(kind, options)
    y = torch.randn(ROWS, D_IN)
    target = torch.randn(ROWS, D_IN + 1) if sae.transcodes else y
    batch = TrainingBatch(y=y, target=target, variance=float(D_IN), labels=torch.arange(ROWS) % 9)
    is_dead = torch.arange(D_SAE) < dead
    start(sae, batch, is_dead)
    largest = Largest()
    with largest:
        for step in (0, 20, 21):
            output = sae.training_output(batch, TrainingState(step, 100, is_dead))
            output.loss.backward()
            assert 0 < float(output.l0) < 40
        sae.before_step()
        sae.after_step()
        sae.eval().calibrate(lambda: iter([y]))
        if not sae.site_normalisers:
            sae(y)
    assert ROWS * D_IN <= largest.numbers < ROWS * D_SAE / 2, largest.by


def test_a_dense_step_is_noticed() -> None:
    sae = make("topk", {})
    with Largest() as largest:
        torch.relu(sae.encoder_input(torch.randn(ROWS, D_IN)) @ sae.W_enc)
    assert largest.numbers == ROWS * D_SAE
