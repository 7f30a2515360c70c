"""`saescope advise`: short runs, what they say of a long one, and the file of it."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from activations import ActivationStore
from sae.commands.advise import AdviseConfig, run_advise, training_file
from sae.commands.train import train
from sae.data.harvests import open_complete
from sae.evaluation.planted import PlantedConfig, PlantedDictionary
from sae.synthetic.world import named_world
from sae.training.advice import bend, best_l0, best_width, doublings, smallest_alike
from sae.training.config import TrainConfig
from sae.training.run import Run
from sae.training.schedules import default_lr
from sae.training.short_runs import Measured, Setting, ShortRuns
from saescope.__main__ import main
from saescope.config import from_dict, load
from saescope.errors import InputError


def measured(l0: float = 8.0, **values: Any) -> Measured:
    facts: dict[str, Any] = {
        "target_l0": l0, "d_sae": 64, "steps": 100, "lr_factor": 1.0, "lr": 1e-3, "l0": l0,
        "fvu": 0.1, "dead_fraction": 0.0, "decoder_similarity": 0.1, "seconds": 1.0,
    }  # fmt: skip
    return Measured(**(facts | values))


def planted_harvest(folder: Path, rows: int = 20_000) -> str:
    """50 features in pairs that fire together, 6 a row."""
    planted = PlantedDictionary(
        PlantedConfig(d_in=100, features=50, active=6, zipf=0.2, structure="correlated", offset=0.0)
    )
    x = planted.sample(rows, stream=1).x.numpy()
    ActivationStore.from_arrays(str(folder), {"mlp": x}, tokens=np.arange(rows) % 50)
    return str(folder)


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> str:
    return planted_harvest(tmp_path_factory.mktemp("advise") / "harvest", 2000)


def config(harvest: str, out: Path, **more: Any) -> AdviseConfig:
    values: dict[str, Any] = {
        "harvest": harvest, "out": str(out), "steps": 8, "evaluation_rows": 256,
        "calibration_rows": 256, "sae": {"kind": "batchtopk", "d_sae": 48, "k": 4.0},
        "trainer": {"batch_size": 64, "eps": 1e-8},
    }  # fmt: skip
    return from_dict(AdviseConfig, values | more, "test")


def test_the_least_alike_is_found_by_factors_of_two_and_then_finer() -> None:
    asked = []

    def measure(l0: float) -> Measured:
        asked.append(l0)
        return measured(l0, decoder_similarity=0.1 + 0.05 * abs(np.log2(l0 / 11)))

    assert best_l0(measure, 32.0, highest=1000) == (11.0, "similarity")
    assert asked == [32, 16, 64, 8, 128, 4, 6, 11]
    asked.clear()
    assert best_l0(lambda l0: measure(l0 * 4), 32.0, highest=1000) == (3.0, "similarity")


def test_the_bend_of_fvu_counts_and_without_any_sign_what_was_given() -> None:
    def measure(l0: float) -> Measured:
        fvu = l0**-1.0 if l0 <= 16 else 16**-1.0 * (l0 / 16) ** -0.1
        return measured(l0, decoder_similarity=1 / l0, fvu=fvu)

    assert best_l0(measure, 32.0, highest=1000) == (16.0, "bend")
    found = {l0: measured(l0, fvu=fvu) for l0, fvu in ((2.0, 0.4), (4.0, 0.1), (8.0, 0.09))}
    assert bend(found) == 4.0
    assert best_l0(
        lambda l0: measured(l0, decoder_similarity=1 / l0, fvu=l0**-0.5), 32.0, highest=999
    ) == (
        32.0,
        "start",
    )


def test_without_time_what_was_measured_first_counts() -> None:
    made = [measured(32.0)]
    assert best_l0(lambda _: made.pop() if made else None, 32.0, highest=99)[0] == 32.0


def test_of_equal_similarities_the_smallest_l0_counts() -> None:
    assert smallest_alike({4.0: 0.0601, 8.0: 0.0506, 16.0: 0.05, 32.0: 0.0501}) == 16.0
    assert smallest_alike({16.0: 0.05, 8.0: 0.05005}) == 8.0


def test_a_width_must_be_worth_it() -> None:
    runs = [measured(d_sae=32, fvu=0.2), measured(d_sae=64, fvu=0.15)]
    assert best_width([measured(d_sae=128, fvu=0.149), *runs]).d_sae == 64
    assert best_width([*runs, measured(d_sae=128, fvu=0.12)]).d_sae == 128
    assert best_width([*runs, measured(d_sae=128, fvu=0.12, dead_fraction=0.3)]).d_sae == 64


def test_tokens_are_doubled_until_that_gains_nothing() -> None:
    # gains of 10% and 5% go on as 2.5%, 1.25%
    assert doublings([1.0, 0.9, 0.9 * 0.95]) == 2
    assert doublings([1.0, 1.01, 1.0]) == 0
    assert doublings([1.0]) == 0
    # no more than 0.9 of the one before, where gains do not fall: 10%, 9%, ... 1.01%
    assert doublings([1.0, 0.9, 0.81]) == 21


def test_it_writes_a_training_file_that_train_takes(
    harvest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = config(harvest, tmp_path / "run", trainer={"batch_size": 64, "snapshots": 2})
    found = run_advise(before)
    assert found is not None
    assert not (tmp_path / "run").exists()
    folder = tmp_path / "run-advice"
    assert sorted(path.name for path in folder.iterdir()) == ["advice.json", "train.toml"]
    written = json.loads((folder / "advice.json").read_text())
    assert written["advice"]["target_l0"] == found.target_l0
    assert len(written["advice"]["measured"]) == len(found.measured) >= 10
    settings = {(m.target_l0, m.d_sae, m.steps, m.lr_factor) for m in found.measured}
    assert len(settings) == len(found.measured)
    assert {m.d_sae for m in found.measured} == {24, 48, 96}
    assert {m.steps for m in found.measured} == {2, 4, 8}
    read = load(TrainConfig, folder / "train.toml")
    assert (read.harvest, read.out, read.sae.d_sae) == (harvest, before.out, found.d_sae)
    assert read.trainer == dataclasses.replace(
        before.trainer, lr=found.lr, target_l0=found.target_l0
    )
    factor = found.lr / default_lr(found.d_sae, found.steps)
    assert min(abs(factor - each) for each in (0.5, 1, 2)) < 0.03
    output = capsys.readouterr().out
    assert f"L0             {found.target_l0:g}, " in output
    assert f"{found.tokens:,} in {found.steps:,} steps" in output
    short = dataclasses.replace(read, passes=1.0)
    assert train(short) is not None
    with pytest.raises(InputError, match=r"holds train\.toml already"):
        run_advise(before)


def test_the_advised_passes_are_the_advised_steps(harvest: str, tmp_path: Path) -> None:
    runs = ShortRuns(config(harvest, tmp_path / "x"), open_complete(harvest), minutes=1, steps=8)
    for steps in (8, 100, 1234):
        run = runs.run(Setting(target_l0=4.0, d_sae=16, steps=steps))
        assert isinstance(run, Run)
        assert run.total_steps == steps


def test_short_runs_leave_the_finish_out_and_the_file_keeps_it(
    harvest: str, tmp_path: Path
) -> None:
    made = config(harvest, tmp_path / "run", minutes=1e-6, finish={"objective": "kl"})
    assert run_advise(made) is not None  # there is no model to go through
    read = load(TrainConfig, tmp_path / "run-advice" / "train.toml")
    assert read.finish == made.finish


def test_a_synthetic_world_and_a_fixed_seed(tmp_path: Path) -> None:
    made = config("synth:tiny", tmp_path / "run")
    world = named_world("synth:tiny")
    setting = Setting(target_l0=4.0, d_sae=24, steps=8)
    found = [ShortRuns(made, world, minutes=5, steps=8).measure(setting) for _ in range(2)]
    assert found[0] is not None
    assert found[1] is not None
    assert dataclasses.replace(found[0], seconds=found[1].seconds) == found[1]
    advice = run_advise(dataclasses.replace(made, minutes=1e-6))
    assert advice is not None
    read = load(TrainConfig, tmp_path / "run-advice" / "train.toml")
    assert read.samples == advice.steps * 64 == advice.tokens


def test_the_minutes_bound_it(harvest: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="minutes: too short for 14 runs of 200 steps"):
        run_advise(config(harvest, tmp_path / "a", steps=None, minutes=1e-4))
    assert not (tmp_path / "a-advice").exists()
    found = run_advise(config(harvest, tmp_path / "b", minutes=1e-6))
    assert found is not None
    assert len(found.measured) == 1
    assert found.target_l0 == 4.0


def test_a_plan_writes_nothing(
    harvest: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_advise(config(harvest, tmp_path / "a", plan=True)) is None
    assert "short runs of 8 steps of 64 rows" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"minutes": 0}, "minutes"),
        ({"hours": -1.0}, "hours"),
        ({"steps": 3}, "steps"),
        ({"objective": "end_to_end"}, "objective: advice is of new SAEs"),
        ({"start_from": "runs/x"}, "start_from: advice is of new SAEs"),
    ],
)
def test_wrong_input(changes: Any, message: str, harvest: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        run_advise(config(harvest, tmp_path / "a", **changes))
    assert list(tmp_path.iterdir()) == []


def test_the_command_line(harvest: str, tmp_path: Path) -> None:
    words = ["advise", "--harvest", harvest, "--out", str(tmp_path / "run"), "--steps", "8"]
    words += ["--sae.kind", "topk", "--sae.d-sae", "32", "--sae.k", "4", "--folder"]
    words += [str(tmp_path / "advice"), "--trainer.batch-size", "64", "--evaluation-rows", "256"]
    assert main(words) == 0
    read = load(TrainConfig, tmp_path / "advice" / "train.toml")
    assert read.sae.kind == "topk"  # type: ignore[attr-defined]
    assert read.evaluation_rows == 256


def test_a_file_says_what_is_not_usual_and_quotes_it() -> None:
    given = from_dict(
        TrainConfig,
        {
            "harvest": 'a "b" \\ ü', "out": "o", "sites": ["x", "y"], "mix_layers": "all",
            "sae": {"kind": "relu"}, "trainer": {"loss": {"visible_fraction": 0.5}, "eps": 1e-10},
        },
        "test",
    )  # fmt: skip
    text = training_file(given)
    assert "passes" not in text
    assert "[trainer.loss]" in text


@pytest.mark.slow
def test_it_finds_the_l0_of_planted_data(tmp_path: Path) -> None:
    """50 correlated features, 6 a row; the search begins at 12."""
    made = config(
        planted_harvest(tmp_path / "harvest"), tmp_path / "run", steps=400, minutes=30,
        evaluation_rows=1024, sae={"kind": "batchtopk", "d_sae": 50, "k": 12.0},
        trainer={"batch_size": 256},
    )  # fmt: skip
    found = run_advise(made)
    assert found is not None
    assert found.l0_from == "bend"
    assert 5 <= found.target_l0 <= 8
    searched = [each for each in found.measured if each.d_sae == 50 and each.steps == 400]
    assert min(searched, key=lambda each: each.decoder_similarity).target_l0 == found.target_l0
