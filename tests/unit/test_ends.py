"""Both ends of a signed SAE's features: in the store, on a text, in the suggestion to steer."""

from pathlib import Path

import numpy as np
import pytest
import torch

import sae
from activations import ActivationStore, load_model
from sae.commands.steer import SteerConfig, steer_text
from sae.indexing.ends import BothEnds, by_ends
from saescope.config import from_dict
from store import FeatureStore
from store.results import BOTH_ENDS
from tests.tiny import make_tiny_harvest, make_tiny_model

D_SAE, SITE = 24, "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model, harvest, run (AbsTopK, k 4), store."""
    folder = tmp_path_factory.mktemp("ends")
    make_tiny_harvest(folder, make_tiny_model(folder / "model"), documents=30)
    values = {
        "harvest": str(folder / "harvest"),
        "out": str(folder / "run"),
        "passes": 2.0,
        "evaluation_rows": 128,
        "sae": {"kind": "abstopk", "d_sae": D_SAE, "k": 4},
        "trainer": {"batch_size": 64, "lr": 3e-3},
    }
    sae.train(from_dict(sae.TrainConfig.specialise({}), values, "tests"))
    sae.index(sae.IndexConfig(run=str(folder / "run"), out=str(folder / "store"), logits=5))
    return folder


@torch.no_grad()
def dense_codes(work: Path) -> torch.Tensor:
    """Signed codes [position, d_sae] of the whole harvest, by its own decoder's dense encoding."""
    harvest = ActivationStore.open(str(work / "harvest"))
    autoencoder = sae.load(work / "run")
    codes = torch.zeros(harvest.n_tokens, D_SAE)
    for split in ("train", "held_out"):
        for chunk in harvest.chunks(split):
            x, position = harvest.read_chunk(SITE, chunk.index)
            codes[position] = autoencoder.encode(x.float())
    return codes


def test_every_end_is_a_feature_of_the_store(work: Path) -> None:
    codes = dense_codes(work)
    assert (codes > 0).any()
    assert (codes < 0).any()
    with FeatureStore.open(work / "store") as store:
        assert (store.d_sae, store.meta[BOTH_ENDS]) == (2 * D_SAE, D_SAE)
        for number in range(2 * D_SAE):
            column = codes[:, number % D_SAE] * (1 if number < D_SAE else -1)
            expected = {int(p): float(column[p]) for p in (column > 0).nonzero()[:, 0]}
            position, activation = store.activations(number)
            found = dict(zip(position.tolist(), activation.tolist(), strict=True))
            assert found.keys() == expected.keys()
            assert found == pytest.approx(expected, rel=1e-5)
            assert store.feature(number).n_active == len(expected)


def test_ends_write_opposite_directions(work: Path) -> None:
    with FeatureStore.open(work / "store") as store:
        for number in range(D_SAE):
            raised = store.logits(number).top[0]
            lowered = store.logits(number + D_SAE).bottom[0]
            assert raised.token_id == lowered.token_id
            assert raised.value == pytest.approx(-lowered.value, rel=1e-5)
    ends = BothEnds(sae.load(work / "run"))
    torch.testing.assert_close(ends.W_dec[:D_SAE], -ends.W_dec[D_SAE:])
    x = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))
    codes = ends.encode_sparse(x).dense()
    signed = sae.load(work / "run").encode(x).detach()
    torch.testing.assert_close(codes.detach()[:, :D_SAE] - codes.detach()[:, D_SAE:], signed)


def test_a_text_has_the_ends_that_fire(work: Path) -> None:
    model, autoencoder = load_model(str(work / "model"), dtype="float32"), sae.load(work / "run")
    plain = sae.features_of_text(model, autoencoder, "The river rose in the night.")
    found = by_ends(plain, D_SAE)
    assert (plain.activation < 0).any()
    assert (found.activation > 0).all()
    sign = np.where(found.feature < D_SAE, 1, -1)
    np.testing.assert_array_equal(found.feature % D_SAE, plain.feature)
    np.testing.assert_array_equal(found.activation * sign, plain.activation)


def test_a_suggested_negative_end_is_subtracted(
    work: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sae.commands.steer.suggest", lambda _: (D_SAE + 3, 2.0, "river"))
    config = SteerConfig(run=str(work / "run"), store=str(work / "store"), prompt="The river")
    steer_text(config)
    strength = round(config.strength * 2.0, 1)
    assert f"add {{3: {-strength}}}" in capsys.readouterr().out
