"""The smallest difference a metric tells: by hand, against simulated runs, and from real ones."""

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from sae.commands import reliability
from sae.commands.evaluate import HeldOut
from sae.commands.evaluate_config import EvaluateConfig
from sae.commands.evaluate_runs import EvaluateRunsConfig
from sae.commands.reliability import seeds_of_runs
from sae.commands.sweep import SweepConfig, sweep
from sae.evaluation import Family, chosen
from sae.evaluation.comparison import compared
from sae.evaluation.floors_file import read_reliability
from sae.evaluation.reliability import floor, smallest_difference
from saescope.__main__ import main
from saescope.errors import InputError
from saescope.metrics import metric
from saescope.seals import sealed
from tests.interrupt import Interrupt, Killed
from tests.tiny import make_tiny_harvest, make_tiny_model

SEEDS = (0, 1, 2)
NAMES = [f"sae-seed={seed}" for seed in SEEDS]


def test_by_hand() -> None:
    # mean 3, s^2 = (4 + 1 + 0 + 1 + 4) / 4 = 2.5; t of 4 degrees 2.7764
    found = floor(
        [1.0, 2.0, 3.0, 4.0, 5.0],
        # per run variances 2, 8, 0, 2, 2 of two groups each
        [[0.0, 2.0], [0.0, 4.0], [3.0, 3.0], [3.0, 5.0], [4.0, 6.0]],
    )
    assert (found.mean, found.values) == (3.0, (1.0, 2.0, 3.0, 4.0, 5.0))
    assert found.seed_sd == pytest.approx(math.sqrt(2.5))
    assert found.smallest_difference == pytest.approx(2.77645 * math.sqrt(2 * 2.5), rel=1e-5)
    assert found.measurement_sd == pytest.approx(math.sqrt((2 + 8 + 0 + 2 + 2) / 5 / 2))
    # halves of the groups' differences less their mean 2: 0, 1, -1, 0, 0; twice each, 4 x 1 degrees
    assert found.paired_sd == pytest.approx(math.sqrt(2 * 2 / 4 / 2))
    seeds = floor([1.0, 2.0], [[1.0, 2.0], [2.0, 4.0]], shares=False)
    assert seeds.measurement_sd == pytest.approx(math.sqrt((0.5 + 2) / 2))
    alone = floor([1.0, 2.0])
    assert (alone.measurement_sd, alone.paired_sd) == (None, None)
    # figures that are always the same still are rounded
    assert smallest_difference([32.0, 32.0, 32.0]) == pytest.approx(32e-5)
    with pytest.raises(ValueError, match="two figures"):
        smallest_difference([1.0])


@pytest.mark.parametrize("runs", [3, 5, 9])
def test_equal_runs_are_called_different_in_5_percent_of_cases(runs: int) -> None:
    generator = torch.Generator().manual_seed(runs)
    trials = 4000
    drawn = 7 + 0.3 * torch.randn(trials, runs + 2, generator=generator, dtype=torch.float64)
    called = sum(
        abs(values[-1] - values[-2]) > smallest_difference(values[:-2]) for values in drawn.tolist()
    )
    assert 0.04 < called / trials < 0.06
    by_normal = sum(
        abs(values[-1] - values[-2]) > 1.96 * math.sqrt(2) * float(torch.tensor(values[:-2]).std())
        for values in drawn[:1000].tolist()
    )
    assert runs > 5 or by_normal / 1000 > 0.07  # what Student's t is for


def test_spreads_of_simulated_runs_and_documents() -> None:
    """y of run r on group g = a_r + b_g + e_rg: seeds, documents, and seeds on documents."""
    generator = torch.Generator().manual_seed(0)
    seed, documents, both, groups = 0.5, 2.0, 0.2, 5
    found = []
    for _ in range(600):
        a = seed * torch.randn(5, 1, generator=generator, dtype=torch.float64)
        b = documents * torch.randn(1, groups, generator=generator, dtype=torch.float64)
        y = a + b + both * torch.randn(5, groups, generator=generator, dtype=torch.float64)
        found.append(floor(y.mean(1).tolist(), y.tolist()))
    mean = {
        name: math.sqrt(sum(getattr(each, name) ** 2 for each in found) / len(found))
        for name in ("seed_sd", "measurement_sd", "paired_sd")
    }
    assert mean["seed_sd"] == pytest.approx(math.hypot(seed, both / math.sqrt(groups)), rel=0.05)
    expected = math.hypot(documents, both) / math.sqrt(groups)
    assert mean["measurement_sd"] == pytest.approx(expected, rel=0.05)
    assert mean["paired_sd"] == pytest.approx(both / math.sqrt(groups), rel=0.05)


@pytest.mark.parametrize(
    ("name", "values", "told", "verdict"),
    [
        ("fvu", (0.2, 0.1), 0.05, "better"),
        ("fvu", (0.1, 0.2), 0.05, "worse"),
        ("fvu", (0.1, 0.2), 0.11, "cannot tell"),
        ("cosine", (0.1, 0.2), 0.05, "better"),
        ("l0", (32.0, 64.0), 1.0, "differs"),
        ("l0", (32.0, 32.5), 1.0, "cannot tell"),
        ("cosine", (0.1, 0.9), None, "cannot tell"),  # no interval
        ("fvu", (None, 0.9), 0.1, "cannot tell"),
    ],
)
def test_verdicts(
    name: str, values: tuple[float | None, float], told: float | None, verdict: str
) -> None:
    one, other = ({name: value} for value in values)
    assert compared(metric(name), one, other, told).verdict == verdict


def test_without_a_floor_the_intervals_decide() -> None:
    one = {"kl": 0.2, "kl_interval": 0.03}
    for kl, verdict in ((0.26, "worse"), (0.24, "cannot tell")):
        found = compared(metric("kl"), one, {"kl": kl, "kl_interval": 0.04})
        assert (found.verdict, found.told) == (verdict, pytest.approx(0.05))
    assert compared(metric("kl"), one, {"kl": 9.0, "kl_interval": None}).verdict == "cannot tell"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A harvest, and a sweep of three seeds on it, measured."""
    root = tmp_path_factory.mktemp("reliability")
    harvest = make_tiny_harvest(root / "data", make_tiny_model(root / "model"))
    base = {
        "sae": {"kind": "relu", "d_sae": 24},
        "trainer": {"batch_size": 64},
        "passes": 0.3,
    }
    sweep(
        SweepConfig(
            harvest=str(harvest), out=str(root / "sweep"), base=base, grid=({"seed": list(SEEDS)},)
        )
    )
    assert main(["eval", str(root / "sweep"), "--tokens", "0"]) == 0
    return root / "sweep"


@pytest.fixture
def runs(trained: Path, tmp_path: Path) -> Path:
    """A copy of the sweep."""
    return Path(shutil.copytree(trained, tmp_path / "sweep"))


def evaluation(run: Path) -> Any:
    return json.loads((run / "evaluation.json").read_text())


def verdicts(label: str, lines: list[str]) -> list[str]:
    """The last column of a metric's lines."""
    return [line.rsplit("  ", 1)[1] for line in lines if line.startswith(f"  {label}  ")]


def change(run: Path, **values: float) -> None:
    """Write other figures into a run's evaluation."""
    found = evaluation(run)
    found["reconstruction"].update(values)
    del found["sha256"]
    (run / "evaluation.json").write_text(json.dumps(sealed(found)))


def test_reliability_of_runs_and_what_compare_says_by_it(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", str(runs), "--tokens", "0", "--reliability"]) == 0
    out = capsys.readouterr().out
    assert out.count("is measured already") == 3
    assert "told from" in out
    found = read_reliability(runs / "reliability.json")
    each = [evaluation(runs / name) for name in NAMES]
    assert found["protocol_hash"] == each[0]["protocol_hash"]
    assert (found["varied"], found["groups"]) == (["seed"], 5)
    assert [run["seed"] for run in found["runs"]] == list(SEEDS)
    fvu = found["floors"]["fvu"]
    values = [one["reconstruction"]["fvu"] for one in each]
    assert fvu["values"] == values
    assert fvu["smallest_difference"] == pytest.approx(smallest_difference(values))
    # documents drawn anew: what the interval of the figure says in another way
    half = each[0]["reconstruction"]["fvu_interval"]
    assert half / 8 < fvu["measurement_sd"] < half
    assert 0 < fvu["paired_sd"] < fvu["measurement_sd"]

    told = fvu["smallest_difference"]
    change(runs / NAMES[1], fvu=values[0] - 1.5 * told)
    words = ["compare", *(str(runs / name) for name in NAMES), "--what", "metrics"]
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "3 seeds of one recipe" in lines[0]
    assert verdicts("FVU", lines)[0] == "better"
    change(runs / NAMES[1], fvu=values[0] + 1.5 * told)
    change(runs / NAMES[2], fvu=values[0] + 0.5 * told)
    assert main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    assert verdicts("FVU", lines) == ["worse", "cannot tell"]
    assert main(["eval", str(runs), "--tokens", "0"]) == 0
    assert f"{runs / NAMES[1]}: worse in FVU" in capsys.readouterr().out


def of_groups(run: EvaluateConfig, wanted: Sequence[Family]) -> list[dict[str, Any]]:
    """A run's figures on each group of its documents."""
    data = reliability._Groups(**vars(HeldOut.open(run)))
    return [data.values_of(group, wanted, {}) for group in range(reliability.GROUPS)]


def test_groups_are_all_documents_each_once(trained: Path) -> None:
    run = EvaluateConfig(run=str(trained / NAMES[0]), tokens=0)
    wanted = chosen(("density", "reconstruction"))
    whole = HeldOut.open(run).measure(wanted)["reconstruction"]
    groups = of_groups(run, wanted)
    assert sum(each["rows"] for each in groups) == whole["rows"]
    assert sum(each["documents"] for each in groups) == whole["documents"]
    l0 = sum(each["rows"] * each["l0"] for each in groups) / whole["rows"]
    assert l0 == pytest.approx(whole["l0"])
    assert len({each["fvu"] for each in groups}) == 5


def reliability_words(runs: Path, *more: str) -> list[str]:
    return ["eval", str(runs), "--tokens", "0", "--reliability", *more]


def test_after_a_kill_the_groups_that_are_left_are_measured(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, kept = runs / "reliability.json", runs / "reliability.unfinished"
    assert main(reliability_words(runs)) == 0
    expected = file.read_bytes()
    file.unlink()
    with monkeypatch.context() as patch:
        Interrupt(patch, HeldOut, "measure_rows", 8, Killed())
        with pytest.raises(Killed):
            main(reliability_words(runs))
    assert kept.exists()
    assert not file.exists()
    with monkeypatch.context() as patch:
        counted = Interrupt(patch, HeldOut, "measure_rows", -1, Killed())
        assert main(reliability_words(runs)) == 0
    assert counted.calls == 3 * 5 - 7
    assert file.read_bytes() == expected
    assert not kept.exists()
    # something else there is found before anything is measured
    kept.write_text("mine")
    assert main(reliability_words(runs, "--rows", "99", "--replace")) == 2
    assert kept.read_text() == "mine"
    assert evaluation(runs / NAMES[0])["reconstruction"]["rows"] > 99


def test_seeds_of_a_family_are_kept_and_its_first_is_the_evaluation(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    killed: list[bool] = []

    def planted(self: HeldOut, families: Any, found: dict[str, Any]) -> dict[str, Any]:
        if len(seeds) == 9 and not killed:
            killed.append(True)
            raise Killed
        seed = self.config.absorption.seed
        seeds.append(seed)
        bias = float(self.sae.W_dec.detach().double().sum())
        found[families[0].section] = {"words": 30, "absorption_fraction": bias + seed**2}
        return {}

    monkeypatch.setattr(HeldOut, "measure_texts", planted)
    words = reliability_words(runs, "--suite", "absorption", "--replace")
    with pytest.raises(Killed):
        main(words)
    assert seeds == [0, 0, 0, 1, 2, 3, 4, 1, 2]
    seeds.clear()
    assert main(words) == 0
    assert seeds == [3, 4, 1, 2, 3, 4]
    found = read_reliability(runs / "reliability.json")["floors"]["absorption_fraction"]
    # of 0, 1, 4, 9, 16 the mean is 6 and the variance (36 + 25 + 4 + 9 + 100) / 4
    assert found["measurement_sd"] == pytest.approx(math.sqrt(43.5))
    assert found["paired_sd"] == pytest.approx(0, abs=1e-9)

    seeds.clear()
    (runs / "reliability.json").unlink()
    assert main([*words, "--metric-seeds", "1"]) == 0
    assert seeds == []
    alone = read_reliability(runs / "reliability.json")
    assert alone["metric_seeds"] == 1
    of_absorption = alone["floors"]["absorption_fraction"]
    assert (of_absorption["measurement_sd"], of_absorption["paired_sd"]) == (None, None)
    for name in ("values", "seed_sd", "smallest_difference"):
        assert of_absorption[name] == found[name]
    (runs / "reliability.json").unlink()
    assert main([*words, "--metric-seeds", "7"]) == 0
    assert seeds == [1, 2, 3, 4, 5, 6] * 3
    with pytest.raises(InputError, match="metric_seeds: out of range"):
        EvaluateRunsConfig(run="x", metric_seeds=0)


def test_runs_that_differ_in_more_than_their_seed(runs: Path, tmp_path: Path) -> None:
    paths = [str(runs / name) for name in NAMES]
    with pytest.raises(InputError, match="needs 3 runs or more"):
        seeds_of_runs(paths[:2])
    with pytest.raises(InputError, match="have the same seeds, and so are one run twice"):
        seeds_of_runs([*paths, shutil.copytree(paths[0], str(tmp_path / "copy"))])
    with pytest.raises(InputError, match=r"absent is no trained run: .*no run here"):
        seeds_of_runs([*paths, str(runs / "absent")])
    with pytest.raises(InputError, match="is on the hub"):
        seeds_of_runs([*paths, "hf://a/b/c"])
    base = {"sae": {"kind": "relu", "d_sae": 24}, "trainer": {"batch_size": 32}, "passes": 0.1}
    harvest = str(shutil.copytree(harvest_of(paths[0]), tmp_path / "harvest"))
    sweep(
        SweepConfig(harvest=harvest, out=str(tmp_path / "other"), base=base, grid=({"seed": [7]},))
    )
    other = str(tmp_path / "other" / "sae-seed=7")
    with pytest.raises(InputError) as error:
        seeds_of_runs([*paths, other])
    assert "differ in more than their seed: " in str(error.value)
    assert "passes (0.3 and 0.1)" in str(error.value)
    assert "trainer.batch_size (64 and 32)" in str(error.value)
    assert "harvest" not in str(error.value)  # the same activations, wherever they are


def harvest_of(run: str) -> str:
    return json.loads((Path(run) / "manifest.json").read_text())["config"]["harvest"]


def test_two_protocols_are_refused(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(runs / NAMES[1]), "--tokens", "0", "--rows", "99", "--replace"]) == 0
    rows = evaluation(runs / NAMES[0])["reconstruction"]["rows"]
    capsys.readouterr()
    pair = ["compare", str(runs / NAMES[0]), str(runs / NAMES[1])]
    for words in (pair, [*pair, str(runs / NAMES[2])]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "were measured under two protocols" in error
        assert f"they differ in: rows ({rows} and 99), documents (" in error
    assert main([*pair, "--what", "features"]) == 0
    capsys.readouterr()
    # nor does the floor of one protocol tell differences under another
    main(["eval", *(str(runs / n) for n in NAMES), "--tokens", "0", "--replace", "--reliability"])
    for name in NAMES:
        main(["eval", str(runs / name), "--tokens", "0", "--rows", "99", "--replace"])
    capsys.readouterr()
    assert main([*pair, "--reliability", str(runs / "reliability.json")]) == 2
    assert "measured under another protocol than these runs; they differ in: rows (99 and" in (
        capsys.readouterr().err
    )
    assert main([*pair, "--what", "metrics"]) == 0
    said = capsys.readouterr().out.splitlines()[0]
    assert "by the intervals of both figures" in said
    assert "reliability.json is of another protocol" in said


def test_compare_without_evaluations(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (runs / NAMES[1] / "evaluation.json").unlink()
    pair = ["compare", str(runs / NAMES[0]), str(runs / NAMES[1])]
    assert main(pair) == 0
    assert "`saescope eval` has not measured" in capsys.readouterr().out
    assert main([*pair, "--what", "metrics"]) == 2
    assert "not measured yet" in capsys.readouterr().err


def test_a_family_with_a_seed_is_measured_with_others() -> None:
    config = EvaluateConfig(run="runs/x", suite=("probing,absorption",))
    changed, seeded = reliability._with_seed(config, chosen((), config.suite), 3)
    assert [family.name for family in seeded] == ["absorption"]
    assert (changed.absorption.seed, changed.probing) == (3, config.probing)


@pytest.mark.slow
def test_groups_of_the_model(trained: Path, tmp_path: Path) -> None:
    run = EvaluateConfig(run=str(trained / NAMES[0]), tokens=1024, out=str(tmp_path / "e.json"))
    wanted = chosen(("downstream",))
    whole = sae.evaluate(run)["downstream"]
    groups = of_groups(run, wanted)
    assert sum(each["tokens"] for each in groups) == whole["tokens"]
    ce = sum(each["tokens"] * each["ce"] for each in groups) / whole["tokens"]
    assert ce == pytest.approx(whole["ce"], abs=1e-4)
