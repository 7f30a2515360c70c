"""The GPU benchmark's script, tried out on the CPU."""

import csv
from pathlib import Path

import pytest

from benchmarks import gpu_step


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_rows_of_a_case(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAESCOPE_KERNELS", "torch")
    out = tmp_path / "results" / "gpu.csv"
    arguments = ["--device", "cpu", "--shapes", "32x8x64x4", "--rounds", "2", "--out", str(out)]
    for _ in range(2):  # the second time is added to the first
        gpu_step.main([*arguments, "--precisions", precision])
    with out.open(newline="", encoding="utf-8") as stream:
        rows = list(csv.DictReader(stream))
    half = rows[: len(rows) // 2]
    assert [row["name"] for row in rows] == 2 * [row["name"] for row in half]
    assert {row["kind"] for row in half} == {"product", "operation", "step"}
    assert all(float(row["median_ms"]) > 0 and float(row["over_product"]) > 0 for row in rows)
    steps = {row["name"]: float(row["fvu"]) for row in half if row["kind"] == "step"}
    assert steps["saescope"] == pytest.approx(steps["dense torch"], rel=0.02)


def test_says_that_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_step.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu_step.main([])
    assert "no CUDA device here" in capsys.readouterr().err
