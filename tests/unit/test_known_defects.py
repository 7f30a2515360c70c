"""Defects found in other training libraries, as tests of our trainer.

Those of one architecture or format stand with its tests: AuxK without a gradient (test_topk),
TopK a batch (test_batchtopk), the undetached decoder (test_gated), lost thresholds and transposed
decoders (contracts/test_formats), resampling that changes nothing (test_relu).
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from sae.architectures import architecture, list_architectures
from sae.architectures.topk import TopKSAE
from sae.core.base import TrainingOutput
from sae.core.batch import RawBatch, TrainingBatch
from sae.kernels import decode
from sae.training.trainer import Trainer, TrainerConfig

D_IN, D_SAE, BATCH = 8, 24, 32
KINDS = sorted(
    kind
    for kind, cls in list_architectures().items()
    if not (cls.transcodes or cls.concatenates or cls.Config().needs_neighbours)
)


class Rows:
    """The same rows for ever."""

    def __init__(self) -> None:
        self.x = torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(0))

    def __iter__(self) -> Any:
        while True:
            yield self.x

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state == {}


def trainer(folder: Path, kind: str = "topk", steps: int = 6, **settings: Any) -> Trainer:
    torch.manual_seed(0)
    cls = architecture(kind)
    names = cls.Config.__dataclass_fields__
    sae = cls(cls.Config(d_sae=D_SAE, **({"k": 3} if "k" in names else {})), D_IN)
    rows = Rows()
    config = TrainerConfig(
        batch_size=BATCH, lr=1e-2, warmup_fraction=0, decay_fraction=0, **settings
    )
    return Trainer(
        sae, rows, config, total_steps=steps, held_out=lambda: iter([rows.x]), folder=folder
    )


def test_accumulation_splits_the_batch_and_keeps_the_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """sparsify's micro_acc_steps only divides the loss, Llamascopium's accumulation is not read."""
    sizes, real = [], TopKSAE.training_output

    def record(self: TopKSAE, batch: TrainingBatch, state: Any) -> TrainingOutput:
        sizes.append(len(batch))
        return real(self, batch, state)

    monkeypatch.setattr(TopKSAE, "training_output", record)
    results = []
    for parts in (1, 4, 5):
        run = trainer(tmp_path / str(parts), accumulate=parts, grad_clip=0.0)
        with torch.no_grad():  # b_dec starts from the first part it sees
            run.sae.start = lambda batch: None
        run.train_step(run.batches.x)  # type: ignore[attr-defined]
        results.append({name: p.detach().clone() for name, p in run.sae.named_parameters()})
        grad = run.sae.W_dec.grad
        assert grad is not None
        results[-1]["gradient"] = grad.clone()
    assert sizes == [32, 8, 8, 8, 8, 7, 7, 7, 7, 4]
    for other in results[1:]:
        torch.testing.assert_close(other["gradient"], results[0]["gradient"], rtol=1e-5, atol=1e-6)


def test_gradients_do_not_pile_up(tmp_path: Path) -> None:
    """openai/sparse_autoencoder's train.py never zeroes them."""
    run = trainer(tmp_path, grad_clip=0.0)
    norms = [run.train_step(Rows().x)["grad_norm"] for _ in range(6)]
    assert norms[-1] < 1.5 * norms[0]


@pytest.mark.parametrize("kind", KINDS)
def test_evaluating_and_logging_change_nothing(tmp_path: Path, kind: str) -> None:
    """dictionary_learning logs by running the objective again: counters advance twice."""
    often = trainer(tmp_path / "often", kind, evaluate_every=1, checkpoint_every=1).run()
    rarely = trainer(tmp_path / "rarely", kind, evaluate_every=99, checkpoint_every=99).run()
    for name, value in rarely.state_dict().items():
        assert torch.equal(often.state_dict()[name], value), name


def test_decoder_is_unit_after_the_step_and_moments_go_on(tmp_path: Path) -> None:
    """ai-safety-foundation renormalises before the step, and restarts Adam at every refill."""
    run = trainer(tmp_path)
    for _ in range(3):
        run.train_step(Rows().x)
        torch.testing.assert_close(run.sae.W_dec.norm(dim=1), torch.ones(D_SAE))
    steps = {int(state["step"]) for state in run.optimiser.state.values()}
    assert steps == {3}


def test_decode_takes_one_feature_a_row_whatever_the_widths(tmp_path: Path) -> None:
    """Llamascopium hands its Triton decoder a transposed matrix."""
    del tmp_path
    W_dec = torch.randn(7, 3)
    found = decode(torch.tensor([0, 1, 3]), torch.tensor([6, 0, 5]), torch.ones(3), W_dec)
    torch.testing.assert_close(found, torch.stack([W_dec[6], W_dec[0] + W_dec[5]]))


@pytest.mark.parametrize("batch", [BATCH, 4 * BATCH, 1])
def test_a_batch_may_have_any_size(tmp_path: Path, batch: int) -> None:
    """SAELens' defaults once raised "Buffer size must be >= batch size"."""
    run = trainer(tmp_path)
    terms = run.train_step(RawBatch(torch.randn(batch, D_IN)))
    assert terms["l0"] <= 3


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_trains_and_keeps_float32_weights(tmp_path: Path, kind: str) -> None:
    run = trainer(tmp_path, kind, steps=12, precision="bfloat16")
    first = run.train_step(Rows().x)["fvu"]
    last = [run.train_step(Rows().x)["fvu"] for _ in range(11)][-1]
    assert last < first
    assert {value.dtype for value in run.sae.parameters()} == {torch.float32}
