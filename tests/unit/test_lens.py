"""Tuned lens: exact inverse, identity at first, lower divergence after training, safe files."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from activations import ActivationStore, Model, load_model
from activations.models.unembedding import Unembedding
from sae.analysis.layers import adjacent_cosine, layer_distances
from sae.analysis.lens import WEIGHTS, LensConfig, TunedLens, divergence, train_lens
from sae.data.streams import make_stream
from sae.evaluation.downstream import measure_downstream
from saescope.artefact import read_manifest
from saescope.errors import ArtefactError, InputError
from tests.sealing import unseal
from tests.tiny import ARCHITECTURES, make_tiny_harvest, make_tiny_model

SITES = tuple(f"blocks.{n}.hook_resid_post" for n in range(3))
D = 32


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> ActivationStore:
    root = tmp_path_factory.mktemp("lens")
    return ActivationStore.open(make_tiny_harvest(root, tiny_folder, sites=SITES))


def random_lens(seed: int = 0, size: float = 0.1) -> TunedLens:
    generator = torch.Generator().manual_seed(seed)
    a = size * torch.randn(3, D, D, generator=generator)
    return TunedLens(SITES, a, torch.randn(3, D, generator=generator))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_gives_the_models_logits(
    tmp_path: Path, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(make_tiny_model(tmp_path / "m", architecture)), dtype="float32")
    tokens = torch.arange(20).reshape(2, 10) + 7
    head = Unembedding(model)
    x = model.capture(tokens, [head.site])[head.site]
    assert torch.allclose(head(x), model.logits(tokens), atol=1e-5)
    x.requires_grad_()
    head(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    monkeypatch.setattr(model, "logits", lambda tokens: 2 * Model.logits(model, tokens))
    with pytest.raises(InputError, match="final norm and unembedding alone"):
        Unembedding(model)


def test_the_map_by_hand() -> None:
    a = torch.tensor([[[0.0, 2.0], [0.0, 1.0]]])
    lens = TunedLens(("s",), a, torch.tensor([[10.0, 20.0]]))
    # x + A x + b with A x = (2 * 3, 1 * 3)
    assert lens.apply("s", torch.tensor([[1.0, 3.0]])).tolist() == [[17.0, 26.0]]
    assert lens.invert("s", torch.tensor([[17.0, 26.0]])).tolist() == [[1.0, 3.0]]
    assert lens.around("s", lambda x: x * 0 + 27)(torch.zeros(1, 2)).tolist() == [[10.0, 3.5]]


def test_the_inverse_is_exact_in_float64() -> None:
    lens = random_lens()
    x = 100 * torch.randn(50, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for site in SITES:
        there = lens.apply(site, x)
        assert there.dtype == torch.float64
        assert float((there - x).norm() / x.norm()) > 0.1
        assert torch.allclose(lens.invert(site, there), x, rtol=1e-11, atol=1e-11)
        single = lens.invert(site, lens.apply(site, x.float()))
        assert single.dtype == torch.float32
        assert torch.allclose(single.double(), x, rtol=1e-4, atol=1e-3)


def test_a_singular_lens_is_refused() -> None:
    a = torch.zeros(1, 2, 2)
    a[0, 0, 0] = -1.0
    lens = TunedLens(("s",), a, torch.zeros(1, 2))
    assert lens.condition("s") == float("inf")
    with pytest.raises(InputError, match="cannot be inverted"):
        lens.invert("s", torch.ones(1, 2))
    a[0, 0, 0] = -1 + 1e-6  # condition 1e6 is still solved in float64
    lens = TunedLens(("s",), a, torch.zeros(1, 2))
    assert lens.invert("s", lens.apply("s", torch.ones(1, 2))).tolist() == [[1.0, 1.0]]


def test_identity_changes_nothing(tiny_model: Model, store: ActivationStore) -> None:
    lens = TunedLens.identity(SITES, D)
    x = torch.randn(4, D)
    assert torch.equal(lens.apply(SITES[0], x), x)
    assert torch.equal(lens.invert(SITES[0], x), x)
    plain = divergence(tiny_model, store, SITES)
    assert divergence(tiny_model, store, SITES, lens) == plain
    assert plain[SITES[2]] == 0.0
    assert plain[SITES[0]] > plain[SITES[1]] > 0.01


def test_divergence_against_plain_torch(tiny_model: Model, store: ActivationStore) -> None:
    held_out = store.split == 1
    tokens = torch.from_numpy(store.tokens[held_out]).long()
    keep = torch.from_numpy(store.keep[held_out])
    final = tiny_model.logits(tokens)[keep].double().log_softmax(-1)
    x = tiny_model.capture(tokens, SITES)[SITES[1]]
    hf = tiny_model.hf
    with torch.no_grad():
        early = hf.lm_head(hf.model.norm(x))[keep].double().log_softmax(-1)
    expected = float((final.exp() * (final - early)).sum(-1).mean())
    found = divergence(tiny_model, store, [SITES[1]], rows=None)
    # the harvest keeps bfloat16
    assert found[SITES[1]] == pytest.approx(expected, rel=0.01)


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, store: ActivationStore) -> TunedLens:
    model = load_model(str(tiny_folder), dtype="float32")
    return train_lens(model, store, config=LensConfig(steps=120, tokens=64, lr=2e-3))


def test_training_lowers_the_divergence(trained: TunedLens, tiny_model: Model, store) -> None:
    before = divergence(tiny_model, store, SITES)
    after = divergence(tiny_model, store, SITES, trained)
    for site in SITES[:2]:
        assert after[site] < 0.7 * before[site]
        assert trained.metadata["kl"][site] == {"without": before[site], "with": after[site]}
        assert trained.metadata["condition"][site] < 1e3
    # the last layer's own stream needs no lens
    assert not trained.A[2].any()
    assert not trained.b[2].any()


def test_training_is_repeatable(tiny_model: Model, store: ActivationStore) -> None:
    config = LensConfig(steps=3, tokens=16)
    torch.manual_seed(0)
    first = train_lens(tiny_model, store, SITES[:1], config)
    torch.manual_seed(1)
    assert train_lens(tiny_model, store, SITES[:1], config).hash == first.hash
    other = train_lens(tiny_model, store, SITES[:1], LensConfig(steps=3, tokens=16, seed=1))
    assert other.hash != first.hash


def test_save_and_load(tmp_path: Path, trained: TunedLens) -> None:
    folder = tmp_path / "lens"
    trained.save(folder)
    found = TunedLens.load(folder)
    assert (found.sites, found.metadata, found.hash) == (
        trained.sites, trained.metadata, trained.hash,
    )  # fmt: skip
    assert torch.equal(found.A, trained.A)
    manifest = read_manifest(folder, kind="lens", schema=2)
    assert manifest["parent"] == trained.metadata["harvest_hash"]
    weights = folder / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ArtefactError, match="damaged lens"):
        TunedLens.load(folder)
    weights.unlink()
    with pytest.raises(ArtefactError, match="damaged lens"):
        TunedLens.load(folder)
    with pytest.raises(ArtefactError, match="no lens here"):
        TunedLens.load(tmp_path)
    trained.save(tmp_path / "older")
    unseal(tmp_path / "older" / "manifest.json", schema=1)
    assert TunedLens.load(tmp_path / "older").hash == trained.hash


def test_a_stream_behind_a_lens(trained: TunedLens, store: ActivationStore) -> None:
    plain = make_stream(store, SITES, mix_layers="all", batch_size=30)
    seen = make_stream(store, SITES, mix_layers="all", batch_size=30, transform=trained)
    raw, through = next(iter(plain)), next(iter(seen))
    assert raw.group is not None
    for number, site in enumerate(SITES):
        mask = raw.group == number
        assert torch.equal(through.x[mask], trained.apply(site, raw.x[mask]))
    assert seen.state_dict()["transform"] == trained.hash
    # the last site's lens is the identity, so its moments are the harvest's own up to sampling
    own, found = store.statistics(SITES[2]), seen.statistics(SITES[2])
    assert found.count == own.count
    assert found.mean_square == pytest.approx(own.mean_square, rel=1e-6)
    assert seen.statistics(SITES[0]).mean_square != pytest.approx(
        store.statistics(SITES[0]).mean_square, rel=1e-3
    )


def test_the_models_loss_is_measured_behind_the_inverse(
    trained: TunedLens, tiny_model: Model, store: ActivationStore
) -> None:
    tokens = torch.from_numpy(store.tokens[:8]).long()
    keep = torch.from_numpy(store.keep[:8])

    def measure(through) -> float:
        return measure_downstream(
            tiny_model, SITES[0], through, torch.zeros(D), tokens, keep
        ).delta_ce

    assert measure(trained.around(SITES[0], lambda x: x)) == pytest.approx(0, abs=1e-5)

    def halved(x: Tensor) -> Tensor:
        return trained.invert(SITES[0], 0.5 * trained.apply(SITES[0], x))

    expected = measure(halved)
    assert measure(trained.around(SITES[0], lambda x: 0.5 * x)) == expected
    assert expected != pytest.approx(measure(lambda x: 0.5 * x), abs=1e-4)


def test_layers_are_compared_behind_a_lens(trained: TunedLens, store: ActivationStore) -> None:
    plain = adjacent_cosine(store, SITES)
    assert torch.equal(plain, adjacent_cosine(store, SITES, lens=TunedLens.identity(SITES, D)))
    expected = []
    x = {site: [] for site in SITES}
    for chunk in store.chunks("train"):
        for site in SITES:
            x[site].append(trained.apply(site, store.read_chunk(site, chunk.index)[0].double()))
    centred = [torch.cat(x[site]) - torch.cat(x[site]).mean(0) for site in SITES]
    for a, b in pairwise(centred):
        expected.append(torch.nn.functional.cosine_similarity(a, b).mean())
    found = adjacent_cosine(store, SITES, rows=None, lens=trained)
    assert torch.allclose(found, torch.stack(expected), rtol=1e-9)
    assert layer_distances(store, SITES, lens=trained).matrix[0, 1] > 0


def test_bad_input(
    tmp_path: Path, tiny_model: Model, store: ActivationStore, tiny_folder: Path
) -> None:
    with pytest.raises(InputError, match="A must be"):
        TunedLens(("s",), torch.zeros(2, 2, 2), torch.zeros(1, 2))
    with pytest.raises(InputError, match="no lens for this site"):
        random_lens().apply("blocks.9.hook_resid_post", torch.zeros(1, D))
    for field in ("steps", "tokens", "lr", "evaluation_tokens"):
        with pytest.raises(InputError, match=rf"lens\.{field}"):
            LensConfig(**{field: 0})
    with pytest.raises(InputError, match="no such site"):
        train_lens(tiny_model, store, ["blocks.7.hook_resid_post"])
    early = make_tiny_harvest(
        tmp_path / "early", tiny_folder, sites=(SITES[0], "blocks.0.mlp.hook_post"), documents=20
    )
    with pytest.raises(InputError, match="lacks the last block's"):
        train_lens(tiny_model, ActivationStore.open(early))
    other = load_model(str(make_tiny_model(tmp_path / "other", seed=1)), dtype="float32")
    with pytest.raises(InputError, match="another model"):
        train_lens(other, store)
