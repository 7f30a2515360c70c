"""What each metric says of SAEs that are worse or better than a trained one by construction."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.planted_training import recipe_of, train
from sae.architectures.transcoder import Transcoder, TranscoderConfig
from sae.core.base import SparseAutoencoder
from sae.evaluation import Family, families
from sae.evaluation.controls import controls
from sae.evaluation.geometry import Geometry
from sae.evaluation.planted import PlantedConfig, PlantedDictionary
from sae.evaluation.rows import pass_over
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError

PLANTED = PlantedDictionary(PlantedConfig(offset=0.0))
TRAINING, HELD_OUT = (PLANTED.sample(4000, stream=n).x for n in (11, 12))


def _on_rows() -> list[Family]:
    return [each for each in families().values() if each.needs == "activations"]


def on_rows(names: tuple[str, ...] = ()) -> list[Family]:
    known = families().values()
    return [
        each for each in known if each.needs == "activations" and (not names or each.name in names)
    ]


def values(sae: Any, x: Tensor = HELD_OUT) -> dict[str, Any]:
    """All values of the families that need activations alone."""
    weights = isinstance(sae, SparseAutoencoder)
    chosen = [family for family in _on_rows() if weights or family.name != "geometry"]
    counted, sums = pass_over(
        sae,
        lambda: x.split(1000),
        [family.measure for family in chosen],
        training=lambda count: lambda: TRAINING[:count].split(1000),
    )
    return {name: value for one in sums for name, value in one.values(counted).items()}


class Identity:
    """Every coordinate is a feature."""

    d_sae = HELD_OUT.shape[1]

    def encode_sparse(self, x: Tensor) -> Any:
        return SparseCodes.from_dense(x)

    def decode(self, codes: Any, like: Tensor) -> Tensor:
        del like
        return codes.dense()


class Mean(Identity):
    """Predicts the mean, with no feature."""

    def encode_sparse(self, x: Tensor) -> Any:
        return super().encode_sparse(torch.zeros_like(x))

    def decode(self, codes: Any, like: Tensor) -> Tensor:
        return HELD_OUT.double().mean(0).expand(codes.batch, -1)


def test_the_identity() -> None:
    found = values(Identity())
    assert found["fvu"] == pytest.approx(0, abs=1e-9)
    ones = ("cosine", "norm_ratio", "l2_ratio", "reconstruction_bias")
    assert {name: found[name] for name in ones} == pytest.approx(dict.fromkeys(ones, 1.0))
    active = float((HELD_OUT != 0).sum(1).double().mean())
    assert (found["l0"], found["dead_fraction"], found["dense_fraction"]) == (active, 0, 1)
    # a coordinate each: several bits for every one, and for which fire only what the rate leaves
    assert found["value_bits"] > 100
    rate = active / 48
    entropy = -rate * math.log2(rate) - (1 - rate) * math.log2(1 - rate)
    assert found["index_bits"] == pytest.approx(48 * entropy, rel=0.05)


def test_the_mean() -> None:
    found = values(Mean())
    assert found["fvu"] == pytest.approx(1, abs=1e-9)
    assert (found["l0"], found["dead_fraction"], found["value_bits"]) == (0, 1, 0)
    assert found["fvu_quantised"] == pytest.approx(1, abs=1e-9)
    assert 0 < found["index_bits"] < 0.02


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of the oracle, a trained SAE and its controls, all values."""
    folder = tmp_path_factory.mktemp("controls")
    recipe = recipe_of("topk", d_sae=64, steps=400, batch_size=256)
    trained = train("topk", PLANTED, recipe, folder).sae
    oracle = trained.clone()
    with torch.no_grad():
        oracle.W_dec.copy_(PLANTED.directions)
        # the directions overlap, and a feature is read off where the others are not seen
        oracle.W_enc_T.copy_(PLANTED.directions)
        oracle.b_enc.zero_()
        oracle.b_dec.zero_()
    saes = {"oracle": oracle, "trained": trained, **dict(controls(trained, TRAINING))}
    return {name: values(sae) for name, sae in saes.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "better"),
    [("fvu", -1), ("cosine", 1), ("fvu_quantised", -1)],
)
def test_reconstruction_ranks_all_controls_below_the_trained(
    found: dict[str, dict[str, Any]], name: str, better: int
) -> None:
    score = {sae: better * values[name] for sae, values in found.items()}
    worst = max(score[each] for each in ("permuted", "random", "untrained", "pca"))
    assert score["trained"] > worst + 0.05
    assert score["permuted"] < score["untrained"]
    assert score["oracle"] > worst + 0.05


@pytest.mark.slow
def test_what_tells_a_permuted_decoder(found: dict[str, dict[str, Any]]) -> None:
    """Encoder and decoder part; codes and the decoder's own cosines stay: these cannot tell."""
    aligned = {sae: each["encoder_decoder_cosine"] for sae, each in found.items() if sae != "pca"}
    assert aligned["oracle"] == pytest.approx(1)
    assert aligned["oracle"] > aligned["trained"] > aligned["permuted"] + 0.4
    assert abs(aligned["permuted"]) < 0.15
    for name in ("cknna", "decoder_max_cosine", "decoder_similarity", "index_bits"):
        assert found["permuted"][name] == pytest.approx(found["trained"][name], rel=1e-4)


@pytest.mark.slow
def test_controls_have_the_l0_of_the_trained(found: dict[str, dict[str, Any]]) -> None:
    wanted = found["trained"]["l0"]
    assert found["pca"]["l0"] == round(wanted)
    for name in ("permuted", "random", "untrained"):
        assert found[name]["l0"] == pytest.approx(wanted, rel=0.2), name


@pytest.mark.slow
def test_controls_leave_the_trained_alone(tmp_path: Path) -> None:
    trained = train("batchtopk", PLANTED, recipe_of("batchtopk", d_sae=64, steps=50), tmp_path).sae
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    first = dict(controls(trained, TRAINING, seed=1))
    assert list(first) == ["permuted", "random", "untrained", "pca"]
    assert all(torch.equal(value, before[name]) for name, value in trained.state_dict().items())
    permuted = first["permuted"]
    assert isinstance(permuted, SparseAutoencoder)
    moved = permuted.W_dec.detach() @ trained.W_dec.detach().T
    assert sorted(moved.argmax(1).tolist()) == list(range(64))
    again = dict(controls(trained, TRAINING, seed=1))
    for name in ("permuted", "random", "untrained"):
        a, b = first[name], again[name]
        assert isinstance(a, SparseAutoencoder)
        assert isinstance(b, SparseAutoencoder)
        assert torch.equal(a.W_dec, b.W_dec)
    l0 = {
        name: float(sae.encode_sparse(HELD_OUT).compact().l0().double().mean())
        for name, sae in first.items()
    }
    assert l0["untrained"] == pytest.approx(3, rel=0.2)
    assert l0["random"] == pytest.approx(3, rel=0.2)


def test_controls_of_a_transcoder_are_refused() -> None:
    transcoder = Transcoder(TranscoderConfig(d_sae=8, k=2), 4, 4)
    with pytest.raises(InputError, match="one site that reconstructs what it reads"):
        next(iter(controls(transcoder, torch.randn(9, 4))))


@pytest.mark.slow
def test_decoder_similarity_is_smallest_at_the_l0_of_the_data(tmp_path: Path) -> None:
    """arXiv 2508.16560: an L0 too low mixes what fires together, one too high is degenerate."""
    config = PlantedConfig(
        d_in=100, features=50, active=6, zipf=0.2, structure="correlated", offset=0.0
    )
    planted = PlantedDictionary(config)
    x = planted.sample(2000, stream=9).x
    similarity = {}
    for l0 in (4, 6, 9):
        recipe = recipe_of("batchtopk", d_sae=50, l0=float(l0), steps=800, batch_size=256)
        sae = train("batchtopk", planted, recipe, tmp_path / str(l0)).sae
        counted, (geometry,) = pass_over(sae, lambda: [x], [Geometry])
        similarity[l0] = geometry.values(counted)["decoder_similarity"]
    assert min(similarity, key=lambda l0: similarity[l0]) == 6
    assert similarity[6] < 0.97 * min(similarity[4], similarity[9])
