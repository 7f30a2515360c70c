"""Configurations for papers' own scale, on small local copies of their models' layouts."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from activations import ActivationStore, CorpusConfig, HarvestConfig, ModelConfig, harvest
from sae.commands.train import train
from sae.papers import paper
from sae.training.config import TrainConfig
from saescope.config import from_dict, read_toml
from saescope.examples import examples
from tests.tiny_raw import D_MODEL, make_pictures, make_tiny_clip, make_tiny_resnet

MODELS = {"csr": (make_tiny_resnet, 12), "msae": (make_tiny_clip, D_MODEL)}


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_row_a_picture_and_a_plan(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert paper(name).configs == (f"{name}-harvest.toml", f"{name}.toml")
    files = [examples()[f"configs/papers/{each}"] for each in paper(name).configs]
    make, width = MODELS[name]
    config = from_dict(HarvestConfig, read_toml(files[0]), where=name)
    assert config.model.kind == "vision"
    store = harvest(
        replace(
            config,
            model=ModelConfig(spec=str(make(tmp_path / "model")), kind="vision", dtype="float32"),
            corpus=CorpusConfig(source=make_pictures(tmp_path / "pictures", 12)),
            out=str(tmp_path / "harvest"),
            held_out_fraction=0.3,
            chunk_rows=4,
        )
    )
    (site,) = store.sites
    assert (site, store.d_in(site)) == (config.sites[0], width)
    assert store.n_rows("train") + store.n_rows("held_out") == 12
    values = {**read_toml(files[1]), "harvest": str(tmp_path / "harvest"), "device": "cpu"}
    values |= {"out": str(tmp_path / "run"), "plan": True}
    values["trainer"]["batch_size"] = 4
    capsys.readouterr()
    assert train(from_dict(TrainConfig.specialise(values), values, where=name)) is None
    said = capsys.readouterr()
    assert name in said.out + said.err
    assert not (tmp_path / "run").exists()


def test_matryoshka_reads_a_harvest_of_its_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (name,) = paper("matryoshka-lm").configs
    values = read_toml(examples()[f"configs/papers/{name}"])
    harvest_file = read_toml(examples()["configs/harvest/gemma-2-2b.toml"])
    assert values["harvest"] == harvest_file["out"]
    rows = np.random.default_rng(0).normal(size=(4000, 16)).astype(np.float32)
    ActivationStore.from_arrays(tmp_path / "data", {harvest_file["sites"][0]: rows})
    values |= {"harvest": str(tmp_path / "data"), "out": str(tmp_path / "run")}
    values |= {"device": "cpu", "plan": True}
    config = from_dict(TrainConfig.specialise(values), values, where=name)
    capsys.readouterr()
    assert train(config) is None
    assert "36864" in capsys.readouterr().out.replace(",", "")
