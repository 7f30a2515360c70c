"""Fields under their old names: read from files, options and tables, and saved as they were."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from sae.training.batch_maker import LossConfig
from saescope import config, renamed_fields
from saescope.config import Config
from saescope.errors import InputError
from saescope.renamed_fields import WAS
from tests.tiny import make_tiny_harvest, make_tiny_model


@dataclass(frozen=True, kw_only=True)
class Table(Config):
    """A table."""

    fraction: float = field(default=1.0, metadata={WAS: "share"})
    """How much."""
    is_fast: bool = field(default=True, metadata={WAS: "fast"})
    """Whether it is."""


@dataclass(frozen=True, kw_only=True)
class Whole(Config):
    """A configuration."""

    source: str = field(metadata={WAS: "origin"})
    """Where from."""
    loss: Table = field(default_factory=Table, metadata={WAS: "objective"})
    """A table."""
    members: tuple[Table, ...] = ()
    """Tables."""
    other: Table | None = None
    """A table, or none."""


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed_fields, "_said", set())


def parse(*words: str) -> Whole:
    return config.parse(Whole, words, program="test", description="", positional="source")


def said(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def line(where: str, old: str, new: str) -> str:
    return f"saescope: {where}: {old} is called {new} now; the old name is still read"


OLD = {
    "origin": "a",
    "objective": {"share": 0.5, "fast": False},
    "members": [{"share": 0.1}, {"fraction": 0.2}],
    "other": {"share": 0.3},
}
WHOLE = Whole(
    source="a",
    loss=Table(fraction=0.5, is_fast=False),
    members=(Table(fraction=0.1), Table(fraction=0.2)),
    other=Table(fraction=0.3),
)


def test_tables_under_old_names_at_any_depth(capsys: pytest.CaptureFixture[str]) -> None:
    assert config.from_dict(Whole, OLD, "x.toml") == WHOLE
    assert said(capsys) == [
        line("x.toml", "origin", "source"),
        line("x.toml", "objective", "loss"),
        line("x.toml", "loss.share", "loss.fraction"),
        line("x.toml", "loss.fast", "loss.is_fast"),
        line("x.toml", "members.share", "members.fraction"),
        line("x.toml", "other.share", "other.fraction"),
    ]
    assert config.from_dict(Whole, OLD, "x.toml") == WHOLE
    assert said(capsys) == []  # once in a process
    new = {"source": "a", "loss": {"fraction": 0.5, "is_fast": False}}
    assert config.from_dict(Whole, new, "x").loss == WHOLE.loss
    assert said(capsys) == []


def test_what_is_saved_has_the_first_names_and_is_read_again() -> None:
    saved = config.to_dict(WHOLE)
    assert saved["objective"] == {"share": 0.5, "fast": False}
    assert saved["origin"] == "a"
    assert config.from_dict(Whole, json.loads(json.dumps(saved)), "manifest.json") == WHOLE


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--objective.share", "0.5"), Table(fraction=0.5)),
        (("--objective.share=0.5",), Table(fraction=0.5)),
        (("--loss.share", "0.5"), Table(fraction=0.5)),
        (("--objective.fraction", "0.5"), Table(fraction=0.5)),
        (("--objective.no-fast",), Table(is_fast=False)),
        (("--loss.no-is-fast",), Table(is_fast=False)),
        (("--loss.no_fast",), Table(is_fast=False)),
    ],
)
def test_options(
    words: tuple[str, ...], expected: Table, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse("a", *words).loss == expected
    renamed = "is-fast" not in words[0]
    assert len(said(capsys)) == renamed


def test_a_file_and_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "c.toml"
    path.write_text('origin = "a"\n[objective]\nshare = 0.5\n')
    assert parse(str(path), "--loss.fraction", "0.7").loss.fraction == 0.7
    assert parse(str(path), "--objective.share", "0.7").loss.fraction == 0.7
    assert parse(str(path), "--source", "b").source == "b"
    assert parse(str(path), "--origin", "b").source == "b"
    assert parse(str(path)).source == "a"
    said(capsys)
    with pytest.raises(SystemExit) as exit_code:
        parse(str(path), "--help")
    assert exit_code.value.code == 0


def test_both_names_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="x: objective is the old name of loss: give one of them"):
        config.from_dict(Whole, {"source": "a", "objective": {}, "loss": {}}, "x")
    with pytest.raises(InputError, match=r"loss\.share is the old name of loss\.fraction"):
        config.from_dict(Whole, {"source": "a", "loss": {"share": 1, "fraction": 1}}, "x")
    with pytest.raises(InputError, match=r"--objective\.share is the old name of --loss\.fraction"):
        parse("a", "--objective.share", "1", "--loss.fraction=1")


def test_unknown_keys_stay_errors(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="unknown key 'objectives'; known here: source, loss"):
        config.from_dict(Whole, {"source": "a", "objectives": {}}, "x")
    with pytest.raises(InputError, match=r"unknown key 'loss\.shares'; known here: fraction"):
        config.from_dict(Whole, {"source": "a", "objective": {"shares": 1}}, "x")
    with pytest.raises(SystemExit):
        parse("a", "--objective.shares", "1")


def test_a_run_of_older_names_goes_on_and_is_the_same_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sites = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
    harvest = make_tiny_harvest(tmp_path, make_tiny_model(tmp_path / "model"), sites=sites)
    values: dict[str, Any] = {
        "harvest": str(harvest),
        "out": str(tmp_path / "run"),
        "passes": 1,
        "evaluation_rows": 200,
        "sae": {"kind": "topk", "d_sae": 48, "k": 4},
    }
    trainer = {"batch_size": 64, "lr": 1e-3}
    old = {**values, "mix": "all", "trainer": {**trainer, "objective": {"tilt": 1.0}}}
    new = {**values, "mix_layers": "all", "trainer": {**trainer, "loss": {"tilt": 1.0}}}
    made = [config.from_dict(sae.TrainConfig, each, "test") for each in (old, new)]
    assert made[0] == made[1]
    assert made[1].mix_layers == "all"
    assert made[1].trainer.loss.tilt == 1.0
    sae.train(made[0])
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    # as versions before the renaming wrote it, and so with their hash
    assert manifest["config"]["mix"] == "all"
    assert manifest["config"]["trainer"]["objective"] == {"tilt": 1.0, "visible_fraction": 1.0}
    assert not {"mix_layers", "loss"} & {*manifest["config"], *manifest["config"]["trainer"]}
    capsys.readouterr()
    sae.train(made[1])
    assert "already trained" in capsys.readouterr().out
    again = config.from_dict(sae.TrainConfig, {**manifest["config"], "site": None}, "manifest.json")
    assert (again.mix_layers, again.trainer.loss) == ("all", made[1].trainer.loss)


def test_rows_in_memory_take_the_old_name(capsys: pytest.CaptureFixture[str]) -> None:
    x = torch.randn(300, 8, generator=torch.Generator().manual_seed(0))
    loss = LossConfig(tilt=1.0)
    settings: dict[str, Any] = {"d_sae": 16, "k": 2, "batch_size": 50, "passes": 1}
    given = [
        sae.train(x, "topk", **settings, **more) for more in ({"objective": loss}, {"loss": loss})
    ]
    assert torch.equal(given[0].W_dec, given[1].W_dec)
    plain = sae.train(x, "topk", **settings)
    assert not torch.equal(plain.W_dec, given[0].W_dec)
