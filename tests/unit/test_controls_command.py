"""`saescope eval --controls`: what each metric has to rank below an SAE, measured beside it."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import pytest
import torch

from sae.architectures.topk import TopKConfig, TopKSAE
from sae.commands.controls import measure_controls
from sae.commands.evaluate import HeldOut
from sae.commands.evaluate_config import EvaluateConfig
from sae.commands.evaluate_runs import EvaluateRunsConfig
from sae.commands.sweep import SweepConfig, sweep
from sae.evaluation import OwnTexts, chosen, families, metric_family
from sae.evaluation.controls import controls
from sae.evaluation.controls_file import read_controls
from sae.evaluation.on_texts import OnTexts
from sae.evaluation.ranks import CONTROLS, ranking, ranking_in_words
from saescope.__main__ import main
from saescope.config import Config
from saescope.errors import ArtefactError, InputError
from saescope.metrics import Metric, metric
from tests.tiny import make_tiny_harvest, make_tiny_model


@pytest.mark.parametrize(
    ("name", "figures", "words"),
    [
        ("fvu", {"trained": 0.2, "permuted": 1.4, "pca": 0.5}, "ranks all right"),
        ("fvu", {"trained": 0.2, "permuted": 0.1, "pca": 0.5}, "ranks wrong permuted"),
        ("cosine", {"trained": 0.9, "permuted": 0.9, "pca": 0.5}, "cannot tell permuted"),
        ("cosine", {"trained": 0.9, "random": 0.95, "pca": 0.9 + 1e-9}, "cannot tell pca; "
         "ranks wrong random"),
        ("l0", {"trained": 32.0, "permuted": 1.0}, "no way is better"),
        ("recovered_zero", {"trained": None, "permuted": 1.0}, "ablation does no harm"),
    ],
)  # fmt: skip
def test_ranking(name: str, figures: dict[str, float | None], words: str) -> None:
    values: dict[str, dict[str, Any]] = {
        sae: {name: value, **({"fvu_interval": 0.01} if name == "fvu" else {})}
        for sae, value in figures.items()
    }
    ranks = ranking(metric(name), values)
    assert ranking_in_words(metric(name), ranks) == words


def test_a_difference_within_the_intervals_is_not_told() -> None:
    values = {
        "trained": {"kl": 0.2, "kl_interval": 0.3},
        "random": {"kl": 0.4, "kl_interval": 0.4},
        "permuted": {"kl": 0.8, "kl_interval": 0.4},
    }
    assert ranking(metric("kl"), values) == {"random": "cannot tell", "permuted": "right"}


def test_principal_components_are_an_sae() -> None:
    torch.manual_seed(0)
    x = torch.randn(500, 8) * torch.tensor([9.0, 5.0, 3.0, 1.0, 0.5, 0.2, 0.1, 0.1]) + 7
    sae = TopKSAE(TopKConfig(d_sae=16, k=3), 8)
    pca = dict(controls(sae, x))["pca"]
    codes = pca.encode_sparse(x)
    assert codes.l0().tolist() == [3] * 500
    mean = x.mean(0)
    _, _, v = torch.linalg.svd(x - mean, full_matrices=False)
    expected = mean + (x - mean) @ v[:3].T @ v[:3]
    torch.testing.assert_close(pca.decode(codes, like=x), expected, atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a tiny harvest, and its harvest."""
    root = tmp_path_factory.mktemp("controls")
    harvest = make_tiny_harvest(root / "data", make_tiny_model(root / "model"))
    sweep(
        SweepConfig(
            harvest=str(harvest),
            out=str(root / "sweep"),
            base={"sae": {"kind": "topk", "d_sae": 32, "k": 4}, "trainer": {"batch_size": 64}},
            grid=({"name": "run"},),
        )
    )
    return root / "sweep" / "run"


def test_controls_are_measured_beside_the_evaluation(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    assert main(["eval", str(run), "--controls", "--tokens", "0"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"{run / 'controls.json'}: the controls of")
    found = read_controls(run / "controls.json")
    evaluation = json.loads((run / "evaluation.json").read_text())
    values = found["values"]
    assert list(values) == ["trained", *CONTROLS]
    assert values["trained"]["fvu"] == evaluation["reconstruction"]["fvu"]
    assert found["evaluation"] == evaluation["protocol_hash"]
    assert found["protocol"]["controls"]["seed"] == 0
    assert found["ranks"]["fvu"] == dict.fromkeys(CONTROLS, "right")
    # the encoder is the trained one's, so that what fires is the same
    for name in ("l0", "dead_fraction", "dense_fraction"):
        assert values["permuted"][name] == values["trained"][name]
    assert values["pca"]["l0"] == 4
    fvu = next(line for line in lines if line.startswith("FVU  "))
    assert fvu.endswith("ranks all right")
    before = (run / "controls.json").read_bytes()
    assert main(["eval", str(run), "--controls", "--tokens", "0"]) == 0
    assert (run / "controls.json").read_bytes() == before
    capsys.readouterr()
    assert main(["doctor", str(run)]) == 0
    (run / "controls.json").write_bytes(before.replace(b'"seed": 0', b'"seed": 1'))
    capsys.readouterr()
    assert main(["doctor", str(run)]) == 1
    assert "controls.json: its content does not match" in capsys.readouterr().out
    with pytest.raises(ArtefactError, match="does not match"):
        read_controls(run / "controls.json")


def test_wrong_input(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    (run / "controls.json").write_text("mine")
    assert main(["eval", str(run), "--controls", "--tokens", "0"]) == 2
    assert "holds something else than what --controls measured" in capsys.readouterr().err
    assert not (run / "evaluation.json").exists()
    with pytest.raises(InputError, match="measured apart from controls"):
        EvaluateRunsConfig(run=str(run), controls=True, reliability=True)


@pytest.mark.slow
def test_in_the_model_each_control_takes_the_place(trained: Path, tmp_path: Path) -> None:
    run = EvaluateConfig(run=str(trained), tokens=512, out=str(tmp_path / "e.json"))
    wanted = chosen(("downstream",))
    evaluation = HeldOut.open(run).measure(wanted)
    values = measure_controls(run, evaluation, wanted)["values"]
    kl = {name: each["kl"] for name, each in values.items()}
    assert len(set(kl.values())) == 5
    assert kl["trained"] < min(kl[name] for name in CONTROLS)
    clean = {each["ce_clean"] for each in values.values()}
    assert len(clean) == 1


# ---- suites with texts of their own --------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class HueConfig(Config):
    """Settings of a family that nobody else knows."""

    def quick(self) -> Self:
        return self


@pytest.mark.usefixtures("own_metrics")
def test_controls_that_a_suite_of_texts_has_measured_are_taken_from_it(
    trained: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured: list[int] = []
    paired: dict[str, float] = {}

    def hue(given: OnTexts[HueConfig]) -> dict[str, Any]:
        measured.append(given.sae.d_sae)
        own = {"hue": 0.5, "hue_interval": 0.1, "warmth": 1.0}
        by_chance = {"hue_by_chance": 0.45, "hue_by_chance_interval": 0.1, **paired}
        return {"hues": 3, **own, **by_chance}

    metric_family(
        "hue",
        needs="texts",
        metrics=[
            Metric(name="hue", label="hue", better="higher", help="A hue.", interval=True),
            Metric(name="hue_by_chance", label="hue, random", better="neither", help="A hue."),
            Metric(name="warmth", label="warmth", better="higher", help="A warmth."),
        ],
        suite="hues",
        texts=OwnTexts(
            settings=HueConfig,
            facts=lambda config, model, site: {"site": site},
            counted=("hues", "hues in all"),
            unit="hues",
            controls={"hue": {"random": "hue_by_chance"}},
        ),
    )(hue)
    run = Path(shutil.copytree(trained, tmp_path / "run"))
    words = ["eval", str(run), "--controls", "--tokens", "0", "--suite", "core,hues"]
    assert main(words) == 0
    assert len(measured) == 1
    lines = capsys.readouterr().out.splitlines()
    found = read_controls(run / "controls.json")
    assert found["values"]["random"]["hue"] == 0.45
    assert found["values"]["random"]["hue_interval"] == 0.1
    assert "hue" not in found["values"]["pca"]
    assert found["ranks"]["hue"] == {"random": "cannot tell"}
    assert not found["ranks"].keys() & {"warmth", "hue_by_chance"}
    assert set(found["ranks"]["fvu"]) == set(CONTROLS)
    shown = next(line for line in lines if line.startswith("hue  ")).split()
    assert shown == ["hue", "0.5000", "-", "0.4500", "-", "-", "cannot", "tell", "random"]

    (run / "evaluation.json").unlink()
    assert main([*words[:-1], "hues", "--replace"]) == 0
    found = read_controls(run / "controls.json")
    assert list(found["values"]) == ["trained", "random"]
    assert len(measured) == 2

    # the same two figures, and by how much they differ hue by hue
    paired |= {"hue_by_chance_difference": 0.05, "hue_by_chance_difference_interval": 0.01}
    (run / "evaluation.json").unlink()
    assert main([*words[:-1], "hues", "--replace"]) == 0
    found = read_controls(run / "controls.json")
    assert found["values"]["random"]["hue_difference"] == 0.05
    assert found["ranks"]["hue"] == {"random": "right"}


def test_each_control_of_a_suite_is_one_that_there_is() -> None:
    for name, family in families().items():
        known = {row.name for row in family.metrics}
        for metric_name, by_control in (family.texts.controls if family.texts else {}).items():
            assert metric_name in known, name
            assert by_control.keys() <= set(CONTROLS), name
