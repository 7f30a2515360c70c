"""`saescope synth`: architectures trained on a world and scored."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sae.architectures import architecture
from sae.architectures.topk import TopKConfig
from sae.commands import synth as command
from sae.commands.synth import SCORES, SHOWN, SynthConfig, frequent_l0, synth, table
from sae.evaluation.true_features import score_true_features
from sae.formats.load import load
from sae.synthetic.stream import SyntheticStream
from sae.synthetic.world import named_world
from sae.training.trainer_config import TrainerConfig
from saescope.__main__ import main
from saescope.errors import InputError


def config(out: Path, **more: Any) -> SynthConfig:
    trainer = TrainerConfig(batch_size=256, lr=3e-3, evaluate_every=40, checkpoint_every=20)
    given = {"architectures": ("topk", "relu"), "samples": 40 * 256, "scored_rows": 5000}
    return SynthConfig(**{"world": "tiny", "out": str(out), "trainer": trainer, **given, **more})


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("synth") / "out"
    return out, synth(config(out))


def test_scores_are_written_and_are_those_of_the_saes(
    done: tuple[Path, list[dict[str, Any]]],
) -> None:
    out, rows = done
    written = json.loads((out / SCORES).read_text())
    assert written["runs"] == rows
    assert [row["run"] for row in rows] == ["topk-0", "relu-0"]
    assert written["protocol"]["d_sae"] == 24
    assert written["protocol"]["l0"] == round(frequent_l0(named_world("synth:tiny"), 24)) == 2
    world = named_world("synth:tiny")
    for row in rows:
        sae = load(out / row["run"])
        scored = SyntheticStream(world, batch_size=1).scored(5000)
        again = score_true_features(sae, sae.W_dec, world.directions, scored)
        for name, value in vars(again).items():
            assert row[name] == pytest.approx(value, rel=1e-6), name
        assert (row["samples"], row["d_sae"], row["rows"]) == (40 * 256, 24, 5000)
    assert rows[0]["f1"] > 0.2


def test_what_is_done_is_not_done_again(
    done: tuple[Path, list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, rows = done
    monkeypatch.setattr(command, "SyntheticRun", None)  # training would fail
    assert synth(config(out)) == rows
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == f"written to {out / SCORES}"
    assert [line.split()[0] for line in said[-4:-1]] == ["run", "topk-0", "relu-0"]


def test_a_run_that_was_trained_but_not_scored_is_scored(
    done: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    out, rows = done
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "topk-0").symlink_to(out / "topk-0")
    found = synth(config(tmp_path / "out", architectures=("topk",)))
    assert found == [{k: v for k, v in rows[0].items() if k != "rows_per_second"}]


def test_seeds_have_other_weights_and_rows(tmp_path: Path) -> None:
    found = synth(config(tmp_path, architectures=("topk",), seeds=(0, 1)))
    assert [row["run"] for row in found] == ["topk-0", "topk-1"]
    assert found[0]["mcc"] != found[1]["mcc"]
    assert found[0]["true_l0"] != found[1]["true_l0"]


def test_saes_are_scored_without_training(
    done: tuple[Path, list[dict[str, Any]]], tmp_path: Path
) -> None:
    out, rows = done
    path = str(out / "topk-0")
    found = synth(config(tmp_path, runs=(path,)))
    for name in SHOWN:
        assert found[0][name] == pytest.approx(rows[0][name], rel=1e-6)
    assert found[0]["run"] == path
    architecture("topk")(TopKConfig(d_sae=8, k=2), 16).save(tmp_path / "narrow")
    with pytest.raises(InputError, match="another width"):
        synth(config(tmp_path / "other", runs=(str(tmp_path / "narrow"),)))


def test_another_protocol_is_refused(done: tuple[Path, list[dict[str, Any]]]) -> None:
    with pytest.raises(InputError, match=r"another protocol \(differs in: samples\)"):
        synth(config(done[0], samples=256))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"world": "huge"}, "no such world"),
        ({"architectures": ("topk", "topk")}, "architectures: each once"),
        ({"architectures": ()}, "architectures: each once"),
        ({"seeds": (-1,)}, "seeds"),
        ({"samples": 0}, "samples"),
        ({"d_sae": 0}, "d_sae"),
        ({"trainer": TrainerConfig(target_l0=3)}, "trainer.target_l0: is given as l0"),
        ({"architectures": ("topkk",)}, "topkk"),
        ({"architectures": ("transcoder",)}, "which a synthetic world has not"),
    ],
)
def test_wrong_input_is_named(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        synth(config(tmp_path / "out", **more))
    assert not (tmp_path / "out").exists()


def test_the_frequent_features_l0_is_counted() -> None:
    world = named_world("synth:tiny")
    expected = float(
        (torch.cat([d.codes.dense() for d in SyntheticStream(world, batch_size=1).scored(65_536)])
         [:, :24] > 0).sum(1).double().mean()
    )  # fmt: skip
    assert frequent_l0(world, 24) == pytest.approx(expected)


def test_a_table_has_a_line_a_run() -> None:
    row = {"run": "topk-0", **dict.fromkeys(SHOWN, 0.25), "dead_latents": 1234}
    head, line = table([row])
    assert head.split()[:4] == ["run", "L0", "F1", "MCC"]
    assert line.split() == ["topk-0", "0.25", *["0.2500"] * 7, "1234"]
    assert len(head) == len(line)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "synth", "tiny", "--out", str(tmp_path / "out"), "--architectures", "topk", "--samples",
        "2560", "--trainer.batch-size", "256", "--scored-rows", "100",
    ]  # fmt: skip
    assert main(words) == 0
    assert "topk-0" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["synth", "tiniest"])
    assert "no such world" in capsys.readouterr().err
