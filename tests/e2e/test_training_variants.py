"""Every kind of training there is, through the command line's functions, on a tiny harvest."""

from pathlib import Path
from typing import Any

import pytest
import torch

import sae
from activations import load_model
from sae.analysis.lens import LensConfig, train_lens
from sae.commands.evaluate import EvaluateConfig, evaluate
from sae.commands.train import train
from sae.training.config import TrainConfig
from saescope.config import from_dict
from saescope.errors import InputError
from tests.tiny import make_tiny_harvest, make_tiny_model

SITES = [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
OUTPUT = "blocks.1.hook_mlp_out"


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("variants")
    model = make_tiny_model(folder / "model")
    make_tiny_harvest(folder, model, sites=(*SITES, OUTPUT)).rename(folder / "data")
    return folder


def run(work: Path, name: str, **settings: Any) -> Path:
    """Train with these settings; the run's folder."""
    values: dict[str, Any] = {
        "harvest": str(work / "data"), "out": str(work / name), "passes": 2.0,
        "evaluation_rows": 200, "sae": {"kind": "topk", "d_sae": 48, "k": 6},
        "trainer": {"batch_size": 64, "lr": 3e-3, "dead_after_tokens": 400, "evaluate_every": 8},
    }  # fmt: skip
    for key, value in settings.items():
        values[key] = {**values.get(key, {}), **value} if isinstance(value, dict) else value
    train(from_dict(TrainConfig, values, "test"))
    return work / name


VARIANTS: dict[str, dict[str, Any]] = {
    "one layer": {"site": SITES[1]},
    "all layers": {"sites": SITES[:2], "mix_layers": "all", "normaliser": "standardised"},
    "drawn layers": {"sites": SITES[:2], "mix_layers": "drawn"},
    "outliers": {"site": SITES[1], "outliers": 1.2},
    "tilted": {"site": SITES[1], "trainer": {"loss": {"tilt": 5.0}}},
    "masked": {"site": SITES[1], "trainer": {"loss": {"visible_fraction": 0.8}}},
    "transcoder": {"site": SITES[0], "target_site": OUTPUT, "sae": {"kind": "transcoder"}},
    "crosscoder": {"sites": SITES, "sae": {"kind": "crosscoder", "activation": "topk"}},
    "same document": {"site": SITES[1], "sae": {"kind": "csr", "positives": "class"}},
    "neighbouring tokens": {"site": SITES[1], "sae": {"kind": "temporal"}, "mix_chunks": 8},
    "accumulated": {"site": SITES[1], "trainer": {"accumulate": 3, "precision": "bfloat16"}},
    "schedule-free": {"site": SITES[1], "trainer": {"optimiser": "schedule_free_adam"}},
    "end to end": {"site": SITES[1], "objective": "end_to_end"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_trains_and_is_measured(work: Path, name: str) -> None:
    """The released SAE reconstructs held-out rows better than their mean, and says what it is."""
    folder = run(work, name.replace(" ", "_"), **VARIANTS[name])
    trained = sae.load(folder)
    assert trained.metadata["held_out"]["rows"] > 0
    found = evaluate(EvaluateConfig(run=str(folder), tokens=150))
    limit = {"end to end": 3.0, "masked": 1.5}.get(name, 1.0)
    assert found["reconstruction"]["fvu"] < limit
    assert (found["downstream"] is None) == (VARIANTS[name].get("mix_layers") is not None)
    if name == "outliers":
        assert trained.metadata["outliers"]["rows_left_out"] > 0
        assert found["protocol"]["outliers"]["multiple"] == 1.2
    if VARIANTS[name].get("mix_layers"):
        own = evaluate(EvaluateConfig(run=str(folder), tokens=150, site=SITES[0], replace=True))
        assert own["protocol"]["site"] == SITES[0]
        assert own["downstream"] is not None
        assert set(trained.metadata["held_out"]["layers"]) == set(SITES[:2])


def test_behind_a_tuned_lens(work: Path) -> None:
    """FVU is of what the lens gives; in the model the lens is undone (MLSAE, section 3)."""
    from activations import ActivationStore

    model = load_model(str(work / "model"), dtype="float32")
    store = ActivationStore.open(work / "data")
    lens = train_lens(model, store, SITES[:1], LensConfig(steps=3, tokens=16))
    lens.save(work / "lens")
    folder = run(work, "lensed", site=SITES[0], lens=str(work / "lens"))
    found = evaluate(EvaluateConfig(run=str(folder), tokens=150))
    assert found["reconstruction"]["fvu"] < 1
    assert found["protocol"]["lens"] == str(work / "lens")
    with (
        pytest.raises(InputError, match="behind a tuned lens"),
        sae.steer(model, sae.load(folder), add={1: 1.0}),
    ):
        pass


def test_going_on_from_a_released_sae(work: Path) -> None:
    """Fine-tuning starts at the given SAE's quality, at whatever scale it trains."""
    first = run(work, "first", site=SITES[1])
    small = {"lr": 1e-9, "batch_size": 64, "evaluate_every": 1}
    second = run(
        work, "second", site=SITES[1], start_from=str(first), normaliser="centred", trainer=small,
        passes=0.2,
    )  # fmt: skip
    x = torch.randn(20, sae.load(first).d_in)
    torch.testing.assert_close(
        sae.load(second).encode(x), sae.load(first).encode(x), rtol=1e-3, atol=1e-3
    )
    with pytest.raises(InputError, match="another architecture or size"):
        run(work, "third", site=SITES[1], start_from=str(first), sae={"d_sae": 32})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": SITES[0], "sae": {"kind": "transcoder"}}, "needs the site to reconstruct"),
        ({"site": SITES[0], "target_site": OUTPUT}, "reconstructs what it reads"),
        ({"sites": SITES}, "several sites need a crosscoder, or mix_layers"),
        (
            {"sites": SITES, "mix_layers": "all", "sae": {"kind": "crosscoder"}},
            "reads all sites at once",
        ),
        ({"site": SITES[0], "sites": SITES, "mix_layers": "all"}, "give sites"),
        ({"site": "blocks.9.hook_resid_post"}, "not in the harvest"),
        ({"site": SITES[1], "trainer": {"target_l0": 2.5}}, "k is a whole number"),
        ({"site": SITES[1], "trainer": {"telemetry": "tensorboard"}}, "tensorboard"),
    ],
)  # fmt: skip
def test_what_does_not_go_together(work: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(work, "wrong", **settings)
    assert not (work / "wrong").exists()
