"""The index of sparse codes against brute force: the same rows, in the same order."""

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.sparse_index import COLUMNS, SparseIndexBenchmark, main
from sae.analysis.sparse_index import SparseIndex, strongest, unit
from sae.bench import rows as results
from sae.kernels.codes import SparseCodes
from saescope.errors import InputError


def whole_codes(rows: int, d_sae: int, seed: int) -> torch.Tensor:
    """Dense codes of small whole numbers, so that sums are exact and many scores are equal."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randint(1, 4, (rows, d_sae), generator=draw).float()
    return values * (torch.rand(rows, d_sae, generator=draw) < 0.15)


@pytest.mark.parametrize("k", [1, 2, 7, 50])
def test_search_is_brute_force(k: int) -> None:
    rows, queries = whole_codes(50, 30, 0), whole_codes(20, 30, 1)
    rows[7], queries[3] = 0, 0  # on which nothing fires
    scores, found = SparseIndex(SparseCodes.from_dense(rows)).search(
        SparseCodes.from_dense(queries), k
    )
    wanted, order = (queries @ rows.T).sort(dim=1, descending=True, stable=True)
    assert np.array_equal(found, order[:, :k])
    assert np.array_equal(scores, wanted[:, :k])


def test_unit_codes_are_searched_by_cosine() -> None:
    rows, queries = whole_codes(200, 40, 2), whole_codes(10, 40, 3)
    rows[11], rows[12] = 0, 5 * queries[4]
    index = SparseIndex.of_unit(SparseCodes.from_dense(rows))
    scores, found = index.search(unit(SparseCodes.from_dense(queries)), 5)
    cosine = torch.nn.functional.cosine_similarity(queries[:, None], rows[None], dim=2)
    np.testing.assert_allclose(scores, cosine.topk(5, dim=1).values, rtol=1e-5)
    assert found[4, 0] == 12


def test_stored_zeros_and_negative_values_count_as_they_are() -> None:
    index = torch.tensor([[0, 1], [2, 1]])
    rows = SparseCodes.from_fixed(index, torch.tensor([[2.0, 0.0], [-1.0, 1.0]]), 3)
    kept = SparseIndex(rows)
    assert kept.bytes == 3 * 8 + 4 * 8
    query = SparseCodes.from_fixed(index[1:], torch.tensor([[1.0, 0.0]]), 3)
    scores, found = kept.search(query, 2)
    assert found.tolist() == [[0, 1]]
    assert scores.tolist() == [[0.0, -1.0]]


def test_equals_are_in_order() -> None:
    scores = np.array([0, 2, 2, 1, 2], np.float32)
    assert [strongest(scores, k).tolist() for k in (1, 2, 4)] == [[1], [1, 2], [1, 2, 4, 3]]


def test_wrong_input() -> None:
    codes = SparseCodes.from_dense(whole_codes(5, 30, 0))
    index = SparseIndex(codes)
    with pytest.raises(InputError, match="another width"):
        index.search(SparseCodes.from_dense(whole_codes(5, 31, 0)), 1)
    for k in (0, 6):
        with pytest.raises(InputError, match=r"search\.k"):
            index.search(codes, k)
    with pytest.raises(InputError, match="no rows"):
        SparseIndex(SparseCodes.from_dense(whole_codes(0, 30, 0)))
    with pytest.raises(InputError, match="not finite"):
        SparseIndex(SparseCodes.from_dense(torch.tensor([[torch.inf]])))


def test_the_benchmark_times_both_ways(tmp_path: Path) -> None:
    path = tmp_path / "found.csv"
    main(
        SparseIndexBenchmark(
            rows=60,
            queries=4,
            d_in=8,
            d_sae=32,
            ks=(2, 4),
            rounds=1,
            results=str(path),
            threads=torch.get_num_threads(),
        )
    )
    found = results.read(path, COLUMNS)
    assert [(row["way"], row["k"]) for row in found] == [
        ("dense", ""),
        ("index", "2"),
        ("index", "4"),
    ]
    # a number and a value for each entry, and where each feature's list begins
    assert [int(row["bytes"]) for row in found] == [
        60 * 8 * 4,
        60 * 2 * 8 + 33 * 8,
        60 * 4 * 8 + 33 * 8,
    ]
    assert all(float(row["cpu_milliseconds_a_query"]) > 0 for row in found)
