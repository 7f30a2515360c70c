"""A sweep: members as configured, bit for bit as trained alone, through kills at any step."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from activations.loading.outliers import OutlierFilter
from sae.commands import sweep
from sae.commands.sweep import SweepConfig, members
from sae.commands.train import train
from sae.formats.load import load
from sae.training import estimate, run
from sae.training.config import TrainConfig
from sae.training.telemetry import read_metrics
from sae.training.trainer import Trainer
from saescope.config import from_dict
from saescope.errors import ArtefactError, InputError
from saescope.locks import locked
from saescope.paths import AnyPath, local
from tests.tiny import make_tiny_harvest, make_tiny_model

SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
TRAINER = {"batch_size": 64, "checkpoint_every": 5, "evaluate_every": 8, "dead_after_tokens": 200}


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sweep")
    return make_tiny_harvest(folder / "data", make_tiny_model(folder / "model"), sites=SITES)


def config(harvest: Path, out: Path, **more: Any) -> SweepConfig:
    grid = (
        {"sae.kind": "topk", "sae.k": [3, 5], "seed": [0, 1], "site": SITES[1]},
        {"sae.kind": "relu", "site": [*SITES]},
    )
    base = {"passes": 1.0, "sae": {"d_sae": 32}, "trainer": TRAINER}
    return SweepConfig(
        **{"harvest": str(harvest), "out": str(out), "base": base, "grid": grid} | more
    )


def same(one: AnyPath, other: AnyPath) -> bool:
    a, b = load(one).state_dict(), load(other).state_dict()
    logs = [read_metrics(local(path) / "metrics.jsonl") for path in (one, other)]
    return all(torch.equal(a[name], b[name]) for name in a) and logs[0] == logs[1]


def test_members_are_the_product_of_the_lists(harvest: Path, tmp_path: Path) -> None:
    found = members(config(harvest, tmp_path))
    assert list(found) == [
        "topk-k=3-seed=0", "topk-k=3-seed=1", "topk-k=5-seed=0", "topk-k=5-seed=1",
        f"relu-site={SITES[0]}", f"relu-site={SITES[1]}",
    ]  # fmt: skip
    one = found["topk-k=5-seed=1"]
    assert (one.sae.k, one.sae.d_sae, one.seed, one.data_seed) == (5, 32, 1, 0)  # type: ignore[attr-defined]
    assert one.trainer.batch_size == 64


def test_every_member_has_the_bits_of_a_run_alone(harvest: Path, tmp_path: Path) -> None:
    chosen = config(harvest, tmp_path / "sweep", at_once=3)
    folders = sweep.sweep(chosen)
    for name, alone in members(chosen).items():
        values = {**run.to_dict(alone), "out": str(tmp_path / name)}
        train(from_dict(TrainConfig, values, "test"))
        assert same(tmp_path / "sweep" / name, tmp_path / name), name
    assert not same(folders[0], folders[1])  # another seed
    assert sweep.sweep(chosen) == folders  # again: nothing to do


def test_members_that_read_alike_share_one_reading(
    harvest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is fitted on the data, outliers here, is fitted once a stream, not once a member."""
    fits, real = [], OutlierFilter.fit.__func__  # type: ignore[attr-defined]

    def fit(cls: type, *arguments: Any, **options: Any) -> OutlierFilter:
        fits.append(arguments)
        return real(cls, *arguments, **options)

    monkeypatch.setattr(OutlierFilter, "fit", classmethod(fit))
    grid = ({"sae.kind": "topk", "sae.k": [3, 5], "site": [*SITES], "outliers": 2.0},)
    sweep.sweep(config(harvest, tmp_path, grid=grid, at_once=1))
    assert len(fits) == len(SITES)


def test_a_second_process_is_refused_before_it_writes(harvest: Path, tmp_path: Path) -> None:
    chosen = config(harvest, tmp_path / "sweep")
    with locked(tmp_path / "sweep", "sweep"), pytest.raises(ArtefactError, match="in use by sweep"):
        sweep.sweep(chosen)
    assert not (tmp_path / "sweep").exists()
    name, alone = next(iter(members(chosen).items()))
    member = tmp_path / "sweep" / name
    with locked(member, "training"):
        with pytest.raises(ArtefactError, match=f"{name}: in use by training, process"):
            train(alone)
        with pytest.raises(ArtefactError, match=f"{name}: in use by training, process"):
            sweep.sweep(chosen)
    assert not member.exists()
    train(alone)
    assert same(member, sweep.sweep(chosen)[0])


def test_sweeps_into_one_folder_list_the_members_of_all(harvest: Path, tmp_path: Path) -> None:
    for k in (3, 5):
        grid = ({"sae.kind": "topk", "sae.k": [k], "site": SITES[1]},)
        sweep.sweep(config(harvest, tmp_path, grid=grid))
    assert list(sweep.read_members(tmp_path)) == ["topk-k=3", "topk-k=5"]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


@pytest.mark.parametrize("kill_at", [2, 16, 17, 31])
def test_killed_and_resumed_ends_with_the_same_bits(
    harvest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: int
) -> None:
    """A kill between two members' checkpoints leaves them at different steps."""
    grid = ({"sae.kind": ["topk", "relu"], "site": SITES[1]},)
    expected = sweep.sweep(config(harvest, tmp_path / "whole", grid=grid))
    chosen = config(harvest, tmp_path / "killed", grid=grid)
    saved, real = [0], Trainer.advance

    def advance(self: Trainer, raw: Any) -> str:
        saved[0] += 1
        if saved[0] == kill_at:
            raise Killed
        return real(self, raw)

    monkeypatch.setattr(Trainer, "advance", advance)
    with pytest.raises(Killed):
        sweep.sweep(chosen)
    monkeypatch.undo()
    for one, other in zip(expected, sweep.sweep(chosen), strict=True):
        assert same(one, other)


def test_plan_writes_nothing(
    harvest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    assert sweep.sweep(config(harvest, out, plan=True)) == []
    printed = capsys.readouterr().out
    assert "steps of 64 rows" in printed
    for word in ("memory", "disk", "time"):
        assert f"\n{word} " in printed
    assert not out.exists()


@pytest.mark.parametrize("rows", [1024, 2048])
def test_plan_of_a_run_shorter_than_what_is_timed(
    harvest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: int
) -> None:
    base = {"passes": 1.0, "sae": {"d_sae": 32}, "trainer": {**TRAINER, "batch_size": rows}}
    sweep.sweep(config(harvest, tmp_path / "sweep", plan=True, base=base))
    said = re.search(rf" (\d) steps of {rows:,} rows", capsys.readouterr().out)
    assert said is not None
    assert 1 <= int(said[1]) < 7


def test_plan_measures_each_kind_of_step_once(
    harvest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another k is another step; another seed or site is not."""
    measured, real = [], estimate._measured
    monkeypatch.setattr(estimate, "_measured", lambda run: measured.append(run) or real(run))
    sweep.sweep(config(harvest, tmp_path / "sweep", plan=True))
    assert [getattr(run.sae_config, "k", None) for run in measured] == [3, 5, None]


def test_a_table_has_a_member_a_layer(harvest: Path, tmp_path: Path) -> None:
    grid = ({"sae.kind": "transcoder", "layer": "0-1,3", "sae.k": [2, 4]},)
    block = "blocks.{layer}"
    sites = {"site": f"{block}.ln2.hook_normalized", "target_site": f"{block}.hook_mlp_out"}
    found = members(config(harvest, tmp_path, base=sites, grid=grid))
    assert list(found)[:3] == [
        "transcoder-layer=0-k=2",
        "transcoder-layer=0-k=4",
        "transcoder-layer=1-k=2",
    ]
    last = found["transcoder-layer=3-k=4"]
    read, written = "blocks.3.ln2.hook_normalized", "blocks.3.hook_mlp_out"
    assert (last.site, last.target_site) == (read, written)
    one = members(config(harvest, tmp_path, base=sites, grid=({"layer": 7},)))
    assert one["sae-layer=7"].target_site == "blocks.7.hook_mlp_out"


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        (({"site": "mlp_in:{layer}"},), r"grid\[0\]: needs a layer in this table"),
        (({"layer": "a"},), "no layers .*given: 'a'"),
        (({"layer": [1, True]},), "no layers"),
        ((), "at least one"),
        (({"sae.kind": "topk", "sae.kk": 3},), r"grid\[0\], member topk.*unknown key 'sae.kk'"),
        (({"sae.kind": "topk", "seed": [0, 0]},), "two members are alike"),
        (({"sae.kind": "topk", "seed": []},), "empty list"),
    ],
)
def test_wrong_grids(harvest: Path, tmp_path: Path, grid: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        members(config(harvest, tmp_path, grid=grid))
