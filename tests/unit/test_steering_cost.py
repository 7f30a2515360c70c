"""`python -m benchmarks.steering_cost`, on a tiny model."""

from pathlib import Path

import torch

from benchmarks import steering_cost
from benchmarks.steering_cost import COLUMNS, CostConfig
from sae.bench import rows as results
from sae.core.base import SparseAutoencoder


def test_each_edit_of_each_task_has_a_row(
    tiny_folder: Path, sae: SparseAutoencoder, tmp_path: Path
) -> None:
    sae.save(tmp_path / "sae")
    threads, out = torch.get_num_threads(), tmp_path / "rows.csv"
    config = CostConfig(
        sae=str(tmp_path / "sae"),
        model=str(tiny_folder),
        context=16,
        new_tokens=3,
        rounds=2,
        results=str(out),
    )
    try:
        steering_cost.main(config)
    finally:
        torch.set_num_threads(threads)
    rows = results.read(out, COLUMNS)
    edits = ("add", "clamp", "several")
    assert [(row["task"], row["edit"]) for row in rows] == [
        (task, edit) for task in ("read", "continue") for edit in edits
    ]
    for row in rows:
        for name in ("ratio", "cpu_ratio", "least_ratio", "plain_s", "steered_s", "cpu_s"):
            assert float(row[name]) > 0, name
        assert (row["strengths"], row["d_sae"], row["rounds"]) == ("8", "64", "2")
    assert [row["new_tokens"] for row in rows] == ["0"] * 3 + ["3"] * 3
