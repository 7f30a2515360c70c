"""What SAELens is given beside ours, learning rates of long runs, runs on the 16k world."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks import synth_16k
from benchmarks.learning_rate import grid
from benchmarks.synth import SynthBenchmark, _schedule
from sae.bench.rows import read
from sae.training.schedules import default_lr
from saescope.artefact import read_json

PROTOCOL: dict[str, Any] = {
    "d_sae": 512,
    "trainer": {"lr": None, "warmup_fraction": 0.05, "decay_fraction": 0.2},
}


def test_saelens_is_given_the_published_rate_or_that_of_ours() -> None:
    published = _schedule(SynthBenchmark(), PROTOCOL, 600)
    assert published == {"lr": 0.0, "warmup_steps": 0, "decay_steps": 0}
    ours = _schedule(SynthBenchmark(schedule="ours"), PROTOCOL, 600)
    assert ours == {"lr": default_lr(512, 600), "warmup_steps": 30, "decay_steps": 120}
    given = {**PROTOCOL, "trainer": {**PROTOCOL["trainer"], "lr": 0.5}}
    assert _schedule(SynthBenchmark(schedule="ours"), given, 600)["lr"] == 0.5


@pytest.mark.parametrize("steps", [10_000, 30_000])
def test_long_runs_are_made_at_the_rule_and_on_either_side_of_it(steps: int) -> None:
    rule = default_lr(512, steps)
    found = {cell.lr for cell in grid() if (cell.kind, cell.steps) == ("topk", steps)}
    assert found == {rule / 2, rule, 2 * rule}


def test_runs_on_the_large_world_go_on_and_stand_beside_the_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synth_16k, "CHECKPOINT_EVERY", 10)

    def run(folder: str, minutes: float | None) -> tuple[int, list[dict[str, Any]]]:
        results = tmp_path / folder / "rows.csv"
        code = synth_16k.work(
            synth_16k.Synth16k(
                world="tiny",
                architectures=("recipe",),
                samples=25 * 1024,
                d_sae=64,
                l0=3,
                scored_rows=2000,
                minutes=minutes,
                work=str(tmp_path / folder),
                results=str(results),
            )
        )
        return code, read(results, synth_16k.COLUMNS)

    assert run("stopped", 1e-6) == (3, []), "at the first checkpoint"
    first = read_json(tmp_path / "stopped" / "recipe-0" / "time.json")
    code, (row,) = run("stopped", None)
    assert code == 0
    assert float(row["cpu_s"]) >= first["cpu_s"]
    assert run("stopped", None) == (0, [row]), "nothing is trained again"
    _, (whole,) = run("whole", None)
    scores = [*synth_16k.SCORES, "samples", "lr"]
    assert [row[name] for name in scores] == [whole[name] for name in scores]

    lines = synth_16k.table([row])
    assert lines[2].startswith(f"| recipe | 25,600 | {float(row['f1']):.3f} |")
    assert lines[-1].startswith("| matryoshka, published | 200,000,000 | 0.879 | 0.793 | 0.779 |")
