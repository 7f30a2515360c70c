"""The loader's benchmark: what it times gives the rows it should, and a row is added for each."""

import csv
from pathlib import Path

import pytest
import torch

from benchmarks.loader import (
    COLUMNS,
    PASSES,
    SITE,
    LoaderBenchConfig,
    make_shards,
    make_store,
    measure,
    ours,
    shard_batches,
)
from saescope.errors import InputError


def test_all_that_is_timed_gives_every_row_once_a_pass(tmp_path: Path) -> None:
    x = torch.arange(1.0, 513.0)[:, None].repeat(1, 4).to(torch.bfloat16)
    expected = x[:, 0].float().repeat(PASSES).sort().values
    store = make_store(tmp_path / "store", x, "bfloat16", 64)
    assert make_store(tmp_path / "store", x, "bfloat16", 64).windows == store.windows
    assert store.n_rows("train") == 512
    assert store.statistics(SITE).count == 512
    shards = make_shards(tmp_path / "shards", x, 64)
    assert len(shards) == 8
    batches = {
        "chunks": list(ours(store, 48, "chunks")(0)),
        "spread": list(ours(store, 32, "spread")(0)),
        "shards": list(shard_batches(shards, 32, 0)),
    }
    assert {len(each) for each in batches["chunks"]} == {48}
    assert {len(each) for each in batches["shards"]} == {32}
    for name in ("spread", "shards"):
        found = torch.cat(batches[name])
        assert found.dtype == torch.float32
        assert torch.equal(found[:, 0].sort().values, expected)
        assert not torch.equal(found[:, 0], expected)


def test_a_row_for_each_is_added(tmp_path: Path) -> None:
    path = tmp_path / "loader.csv"
    config = LoaderBenchConfig(
        results=str(path), work=str(tmp_path / "work"), tiny=True, rounds=2, saelens=False,
        threads=torch.get_num_threads(),
    )  # fmt: skip
    for _ in range(2):
        measure(config)
    with path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 12
    assert tuple(rows[0]) == COLUMNS
    columns = ("library", "setting", "storage", "batches")
    assert [tuple(row[name] for name in columns) for row in rows[:6]] == [
        ("saescope", "spread", "bfloat16", "float32"),
        ("saescope", "spread", "bfloat16", "bfloat16"),
        ("saescope", "chunks", "bfloat16", "float32"),
        ("saescope", "chunks", "bfloat16", "bfloat16"),
        ("saescope", "spread", "int8", "float32"),
        ("safetensors", "4 at a time", "bfloat16", "float32"),
    ]
    assert rows[0]["ratio_to_saescope"] == "1.000"
    assert all(int(row["tokens_per_s"]) > 0 and row["rounds"] == "2" for row in rows)
    with pytest.raises(InputError, match="rounds"):
        LoaderBenchConfig(rounds=0)
