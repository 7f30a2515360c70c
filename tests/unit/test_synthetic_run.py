"""Training on synthetic worlds: `saescope train` with harvest = "synth:…"."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from sae.architectures import architecture, list_architectures
from sae.data.harvests import open_complete
from sae.synthetic.world import named_world
from sae.training.config import TrainConfig
from sae.training.run_folder import read_run
from sae.training.schedules import base_lr, default_lr
from sae.training.synthetic import SyntheticRun
from saescope.config import from_dict
from saescope.errors import InputError

SETTINGS: dict[str, dict[str, Any]] = {"msae": {"ks": (2, 4, 8)}}


def config(out: Path, kind: str = "topk", **more: Any) -> TrainConfig:
    fields = architecture(kind).Config.__dataclass_fields__
    shape = {"d_sae": 64, **({"k": 4} if "k" in fields else {}), **SETTINGS.get(kind, {})}
    values: dict[str, Any] = {
        "harvest": "synth:tiny",
        "out": str(out),
        "samples": 40 * 256,
        "evaluation_rows": 512,
        "calibration_rows": 512,
        "sae": {"kind": kind, **shape},
        "trainer": {"batch_size": 256, "lr": 3e-3, "checkpoint_every": 10, "evaluate_every": 40},
    }
    return from_dict(TrainConfig, values | more, "test")


def fits(kind: str) -> bool:
    cls = architecture(kind)
    config = cls.Config()
    of_texts = config.needs_labels or config.needs_neighbours
    return not (cls.transcodes or cls.concatenates or of_texts)


@pytest.mark.parametrize("kind", sorted(filter(fits, list_architectures())))
def test_every_architecture_learns_from_a_world(kind: str, tmp_path: Path) -> None:
    made = SyntheticRun(config(tmp_path / "run", kind))
    trainer = made.make_trainer(None)
    batches = iter(made.stream)
    losses = [trainer.train_step(next(batches))["loss"] for _ in range(40)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


@pytest.mark.parametrize("kind", ["transcoder", "crosscoder"])
def test_an_architecture_that_needs_more_than_rows_is_refused(kind: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="which a synthetic world has not"):
        SyntheticRun(config(tmp_path / "run", kind))


def test_a_run_is_written_found_again_and_told_from_others(tmp_path: Path) -> None:
    out = tmp_path / "run"
    trained = sae.train(config(out))
    assert trained is not None
    assert trained.metadata["harvest"] == "synth:tiny"
    assert trained.metadata["tokens_trained"] == 40 * 256
    assert trained.metadata["held_out"]["rows"] == 512
    assert read_run(out)["config"]["samples"] == 40 * 256
    again = sae.train(config(out))
    assert again is not None
    assert torch.equal(again.W_dec, trained.W_dec)
    with pytest.raises(InputError, match="differs in: samples"):
        sae.train(config(out, samples=20 * 256))
    with pytest.raises(InputError, match="scored by `saescope synth`"):
        open_complete(trained.metadata["harvest"])


def test_a_run_that_was_interrupted_ends_with_the_same_bits(tmp_path: Path) -> None:
    whole = sae.train(config(tmp_path / "whole"))
    broken = SyntheticRun(config(tmp_path / "broken"))
    broken.start()
    batches = iter(broken.stream)
    for _ in range(25):  # of which the last five are after the checkpoint
        broken.trainer.advance(next(batches))
    resumed = sae.train(config(tmp_path / "broken"))
    assert whole is not None
    assert resumed is not None
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "broken" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [40]


def test_its_learning_rate_follows_its_length_and_a_begun_run_keeps_its_own(tmp_path: Path) -> None:
    sizes = {"batch_size": 256, "checkpoint_every": 10}
    new = SyntheticRun(config(tmp_path / "new", trainer=sizes))
    new.start()
    assert new.trainer.lr == default_lr(64, 40) > base_lr(64)
    manifest = read_run(new.folder)
    assert manifest["learning_rate"] == {"peak": new.trainer.lr, "from": "the steps"}
    older = SyntheticRun(config(tmp_path / "older", trainer={**sizes, "lr_multiplier": 1.0}))
    older.start()  # as all runs were that gave none
    again = SyntheticRun(config(tmp_path / "older", trainer=sizes))
    assert (again.tag, again.trainer.lr) == (older.tag, base_lr(64))


def test_a_normaliser_fits_the_rows(tmp_path: Path) -> None:
    made = SyntheticRun(config(tmp_path / "run")).make_sae()
    x = torch.cat([drawn.x for drawn in SyntheticRun(config(tmp_path)).stream.scored(20_000)])
    y = made.normaliser.apply(x)
    assert float(y.square().sum(1).mean()) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"samples": None}, "samples: a synthetic world has no end"),
        ({"samples": 100}, "samples: fewer rows than one batch"),
        ({"harvest": "data/x"}, "samples: counts the rows of a synthetic world"),
        ({"harvest": "synth:smal"}, "no such world"),
        ({"site": "blocks.0"}, "site: is of harvests"),
        ({"passes": 2.0}, "passes: is of harvests"),
        ({"objective": "end_to_end"}, "objective: is of harvests"),
    ],
)
def test_wrong_input_is_named_and_nothing_written(
    more: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):  # some by the configuration, some by the run
        sae.train(config(tmp_path / "run", **more))
    assert not (tmp_path / "run").exists()


def test_a_plan_says_what_would_be_done(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert sae.train(config(tmp_path / "run", plan=True)) is None
    assert "topk, 32 x 64, 40 steps of 256 rows of synth:tiny (96 true features)" in (
        capsys.readouterr().out
    )
    assert not (tmp_path / "run").exists()


def test_a_named_world_is_made_once() -> None:
    assert named_world("synth:tiny") is named_world("synth:tiny")
