"""Which heads features are made of: numbers set by hand, W_O pulled back, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch

from activations import Model, load_model
from activations.models.attention import HeadOutputs
from sae.analysis.attention import head_attribution
from sae.architectures.relu import ReLUConfig, ReLUSAE
from sae.architectures.transcoder import Transcoder, TranscoderConfig
from saescope.errors import InputError
from tests.tiny import D_MODEL, make_tiny_model

Z, OUT = "blocks.1.attn.hook_z", "blocks.1.hook_attn_out"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("models")
    names = ("llama", "gpt2", "gemma2")
    return {n: load_model(str(make_tiny_model(root / n, n)), dtype="float32") for n in names}


def with_rows(rows: Any, side: str = "decoder") -> ReLUSAE:
    made = ReLUSAE(ReLUConfig(d_sae=len(rows)), D_MODEL).eval()
    with torch.no_grad():
        (made.W_dec if side == "decoder" else made.W_enc_T).copy_(torch.as_tensor(rows))
    return made


def attributed(model: Model, made: Any, **options: Any) -> Any:
    return head_attribution(model, made, allow_other_model=True, **{"site": Z, **options})


def test_norms_by_hand(models: dict[str, Model]) -> None:
    rows = torch.zeros(3, D_MODEL)
    rows[0, 0], rows[0, 1], rows[0, 24] = 3.0, 4.0, 15.0  # 5 in head 0, 15 in head 3 of four
    rows[1, 8:16] = 1.0
    found = attributed(models["llama"], with_rows(rows))
    assert found.norm[0].tolist() == [5.0, 0.0, 0.0, 15.0]
    assert found.share[0].tolist() == [0.25, 0.0, 0.0, 0.75]
    assert found.share[1].tolist() == [0.0, 1.0, 0.0, 0.0]
    assert found.share[2].tolist() == [0.0] * 4
    assert found.top_head[:2].tolist() == [3, 1]
    assert found.features_of(3, 1) == [0]
    assert (found.layer, found.unique, found.outside.tolist()) == (1, True, [0.0] * 3)
    assert 0.25 < found.random_top_share < 0.4
    read = attributed(models["llama"], with_rows(rows, "encoder"), by="encoder")
    assert torch.equal(read.norm, found.norm)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "gemma2"])
def test_pulled_back_through_the_output_matrix(models: dict[str, Model], architecture: str) -> None:
    model = models[architecture]
    out = HeadOutputs.of(model, 1).up_to_scale()
    heads = torch.zeros(2, D_MODEL, dtype=torch.float64)
    heads[0, 8:16] = torch.arange(8) - 3.0  # head 1 alone
    heads[1, 0:8], heads[1, 24:32] = 2.0, 1.0
    found = attributed(model, with_rows((heads @ out).float()), site=OUT)
    assert found.unique
    assert found.outside.max() < 1e-8
    assert torch.allclose(found.share[0], torch.tensor([0, 1, 0, 0]).double(), atol=1e-4)
    assert torch.allclose(found.share[1], torch.tensor([2, 0, 0, 1]).double() / 3, atol=1e-4)
    # what is read of each head is what its output changes in the feature's pre-activation
    made = with_rows(torch.randn(2, D_MODEL), "encoder")
    read = attributed(model, made, site=OUT, by="encoder")
    through = (out @ made.W_enc.detach().double()).T
    assert torch.allclose(read.norm[:, 2], through[:, 16:24].norm(dim=1))


def test_what_heads_cannot_write_is_outside(
    models: dict[str, Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Narrow:
        @staticmethod
        def up_to_scale() -> torch.Tensor:
            return torch.diag(torch.tensor([1.0] * 31 + [1e-5], dtype=torch.float64))

    monkeypatch.setattr(HeadOutputs, "of", lambda *_: Narrow)
    rows = torch.zeros(2, D_MODEL)
    rows[0, 0], rows[0, 31] = 0.6, 0.8
    rows[1, 5] = 1.0
    found = attributed(models["llama"], with_rows(rows), site=OUT)
    assert found.outside.tolist() == pytest.approx([0.64, 0.0], abs=1e-6)
    assert found.norm[0].tolist() == pytest.approx([0.6, 0, 0, 0], abs=1e-6)
    assert not found.unique


def test_what_is_refused(models: dict[str, Model]) -> None:
    model, made = models["llama"], with_rows(torch.eye(2, D_MODEL))
    with pytest.raises(InputError, match=r"belong to attention heads.*allowed: blocks"):
        attributed(model, made, site="blocks.1.hook_resid_post")
    with pytest.raises(InputError, match="no such weights"):
        attributed(model, made, by="both")
    other = Transcoder(TranscoderConfig(d_sae=2, k=1), D_MODEL)
    with pytest.raises(InputError, match="different sites"):
        attributed(model, other)
    model.hf.config.num_attention_heads, before = 5, model.hf.config.num_attention_heads
    try:
        with pytest.raises(InputError, match="not as wide as so many heads"):
            attributed(model, made)
    finally:
        model.hf.config.num_attention_heads = before


def test_outputs_of_heads_are_the_models_own(models: dict[str, Model], tmp_path: Path) -> None:
    for architecture in ("llama", "gpt2"):
        model = models[architecture]
        ids = torch.tensor([model.tokenize("The river rose in the night")])
        found = model.capture(ids, [Z, OUT])
        out = HeadOutputs.of(model, 1)
        made = found[Z][0].double() @ out.up_to_scale()
        made = made if out.bias is None else made + out.bias
        assert torch.allclose(made, found[OUT][0].double(), atol=1e-5)
