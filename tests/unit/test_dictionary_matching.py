"""Two SAEs compared by their decoders, and by their codes over a harvest."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from pyarrow import parquet
from torch import Tensor

from sae.analysis.dictionary_matching import lineage, match_codes, match_decoders
from sae.architectures.topk import TopKConfig, TopKSAE
from sae.core.base import SparseAutoencoder
from sae.data.harvests import open_harvest
from saescope.__main__ import main
from saescope.errors import InputError
from store.matching import expected_max_cosine
from tests.hand_store import make_hand_store

SITE = "blocks.1.hook_resid_post"
D_IN, D_SAE, ROWS = 12, 40, 200


def random_sae(seed: int, d_sae: int = D_SAE, d_in: int = D_IN) -> SparseAutoencoder:
    torch.manual_seed(seed)
    made = TopKSAE(TopKConfig(d_sae=d_sae, k=4), d_in).eval()
    made.metadata = {"site": SITE}
    return made


def permuted(sae: SparseAutoencoder, order: Tensor) -> SparseAutoencoder:
    """The same SAE with feature order[i] as its feature i."""
    made = random_sae(0)
    state = {name: value.clone() for name, value in sae.state_dict().items()}
    for name in ("W_enc_T", "b_enc", "W_dec"):
        state[name] = state[name][order]
    made.load_state_dict(state)
    return made


@pytest.fixture
def harvest(tmp_path: Path) -> Path:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS + 40, D_IN, generator=rng)
    make_hand_store(tmp_path / "harvest", {SITE: x[:ROWS]}, {SITE: x[ROWS:]})
    return tmp_path / "harvest"


def test_an_sae_and_itself_with_permuted_features() -> None:
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(1))
    found = match_decoders(random_sae(3), permuted(random_sae(3), order))
    pairs = found.matched.to_pandas()
    assert len(pairs) == D_SAE
    assert (order.numpy()[pairs["feature_b"]] == pairs["feature_a"]).all()


def test_random_decoders_have_the_chance_value() -> None:
    found = match_decoders(random_sae(0, 900, 32), random_sae(1, 500, 32))
    assert found.mean_max_a == pytest.approx(expected_max_cosine(32, 500), abs=0.01)


def test_decoders_of_other_widths() -> None:
    with pytest.raises(InputError, match=r"different widths.*given: \(12, 8\)"):
        match_decoders(random_sae(0), random_sae(0, d_in=8))


def test_codes_of_the_same_rows_match(harvest: Path) -> None:
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(1))
    a, b = random_sae(3), permuted(random_sae(3), order)
    store, at_a = open_harvest(a, str(harvest))
    _, at_b = open_harvest(b, str(harvest))
    found, rows = match_codes(store, at_a, at_b, rows=10_000)
    assert rows == ROWS + 40
    fires = sum(
        a.encode(store.read_chunk(SITE, chunk.index)[0].float()).gt(0).sum(0)
        for split in ("train", "held_out")
        for chunk in store.chunks(split)
    )
    assert isinstance(fires, Tensor)
    pairs = found.matched.to_pandas()
    assert set(pairs["feature_a"]) == set(fires.nonzero()[:, 0].tolist())
    assert (order.numpy()[pairs["feature_b"]] == pairs["feature_a"]).all()
    assert pairs["similarity"].min() == pytest.approx(1, abs=1e-5)


def test_correlations_are_those_of_dense_codes(harvest: Path) -> None:
    a, b = random_sae(3), random_sae(4)
    store, at_a = open_harvest(a, str(harvest))
    found, rows = match_codes(store, at_a, open_harvest(b, str(harvest))[1], rows=2)
    chunks = list(store.chunks("held_out"))
    assert rows == chunks[0].rows, "whole chunks, held-out ones first"
    x = store.read_chunk(SITE, chunks[0].index)[0].float()
    with torch.inference_mode():
        codes = [sae.encode(x).double().numpy().T for sae in (a, b)]
    with np.errstate(invalid="ignore"):
        wanted = np.nan_to_num(np.corrcoef(codes[0], codes[1])[:D_SAE, D_SAE:])
    np.testing.assert_allclose(found.similarity_a, wanted.max(1), atol=1e-6)
    np.testing.assert_allclose(found.similarity_b, wanted.max(0), atol=1e-6)


def test_a_feature_is_followed_through_a_series() -> None:
    generator = torch.Generator().manual_seed(2)
    orders = [torch.randperm(D_SAE, generator=generator) for _ in range(2)]
    first = random_sae(3)
    second = permuted(first, orders[0])
    third = permuted(second, orders[1])
    gone = random_sae(9)
    saes = (first, second, third, gone)
    steps = [match_decoders(a, b, threshold=0.99) for a, b in itertools.pairwise(saes)]
    path = list(lineage(steps, 7))
    assert len(path) == 2, "the last SAE has no such feature"
    assert orders[0][path[0][0]] == 7
    assert orders[1][path[1][0]] == path[0][0]
    assert [similarity for _, similarity in path] == pytest.approx([1, 1], abs=1e-6)


def test_the_command(harvest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    order = torch.randperm(D_SAE, generator=torch.Generator().manual_seed(1))
    random_sae(3).save(tmp_path / "a")
    permuted(random_sae(3), order).save(tmp_path / "b")
    words = ["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--top", "2"]
    assert main([*words, "--out", str(tmp_path / "pairs.parquet")]) == 0
    said = capsys.readouterr().out
    chance = expected_max_cosine(D_IN, D_SAE)
    assert f"cosine of decoder directions; random ones would have {chance:.3f}" in said
    assert "40 features, mean max similarity 1.000, 0 unmatched" in said
    assert "40 pairs matched one to one" in said
    table = parquet.read_table(tmp_path / "pairs.parquet").to_pandas()
    assert (order.numpy()[table["feature_b"]] == table["feature_a"]).all()
    assert main([*words, "--by", "activations", "--harvest", str(harvest)]) == 0
    assert f"correlation of activations over {ROWS + 40} rows" in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "pairs.parquet")]) == 2
    assert "never replaced" in capsys.readouterr().err
    random_sae(0, d_in=8).save(tmp_path / "narrow")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "narrow")]) == 2
    assert "different widths" in capsys.readouterr().err
    assert main(["compare", str(tmp_path / "a")]) == 2
    assert "kept no snapshots" in capsys.readouterr().err
