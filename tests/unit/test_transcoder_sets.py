"""Sets of transcoders: one sweep file trains one a layer, and they are loaded together."""

from pathlib import Path

import pytest
import torch

from sae.architectures.topk import TopKConfig, TopKSAE
from sae.commands.sweep import SweepConfig, sweep
from sae.formats.load import load
from sae.formats.transcoder_sets import load_transcoders
from saescope.errors import ArtefactError, InputError
from tests.tiny import make_tiny_harvest, make_tiny_model

LAYERS = range(3)


def read(layer: int) -> str:
    return f"blocks.{layer}.ln2.hook_normalized"


def written(layer: int) -> str:
    return f"blocks.{layer}.hook_mlp_out"


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep that trained a JumpReLU transcoder at every layer of a small model."""
    folder = tmp_path_factory.mktemp("set")
    sites = (*map(read, LAYERS), *map(written, LAYERS))
    harvest = make_tiny_harvest(folder / "data", make_tiny_model(folder / "model"), sites=sites)
    config = SweepConfig(
        harvest=str(harvest),
        out=str(folder / "runs"),
        base={
            "passes": 1.0,
            "site": read(0).replace("0", "{layer}"),
            "target_site": written(0).replace("0", "{layer}"),
            "sae": {"d_sae": 32, "activation": "jumprelu"},
            "trainer": {"batch_size": 64, "target_l0": 4.0},
        },
        grid=({"sae.kind": "skip_transcoder", "layer": "0-2"},),
    )
    sweep(config)
    return folder / "runs"


def test_one_sweep_makes_a_set_in_the_order_of_its_layers(swept: Path) -> None:
    found = load_transcoders(str(swept))
    assert [sae.metadata["site"] for sae in found] == [read(layer) for layer in LAYERS]
    assert [sae.metadata["target_site"] for sae in found] == [written(layer) for layer in LAYERS]
    one = load(swept / "skip_transcoder-layer=2")
    x = torch.randn(5, one.d_in)
    assert torch.equal(found[2](x).x_hat, one(x).x_hat)
    assert found[2].config.activation == "jumprelu"  # type: ignore[attr-defined]


def test_paths_in_any_order(swept: Path) -> None:
    paths = sorted(swept.glob("skip_transcoder-*"), reverse=True)
    found = load_transcoders([paths[0], str(paths[2])])
    assert [sae.metadata["site"] for sae in found] == [read(0), read(2)]


def test_what_is_no_set_is_refused(swept: Path, tmp_path: Path) -> None:
    first = next(iter(sorted(swept.glob("skip_transcoder-*"))))
    with pytest.raises(InputError, match=r"two transcoders of one layer .*given: 'layer 0'"):
        load_transcoders([first, first])
    with pytest.raises(InputError, match="at least one"):
        load_transcoders([])
    with pytest.raises(ArtefactError, match="no runs and no SAEs"):
        load_transcoders(tmp_path)
    with pytest.raises(InputError, match="name the folder of each transcoder"):
        load_transcoders("hf://me/transcoders")
    TopKSAE(TopKConfig(d_sae=8, k=2), 4).save(tmp_path / "topk")
    with pytest.raises(InputError, match=r"no transcoder of one layer .*given: 'topk'"):
        load_transcoders(tmp_path)
    other = load(first)
    other.metadata |= {"site": read(1), "target_site": written(1), "model": "another"}
    other.save(tmp_path / "other")
    with pytest.raises(InputError, match=r"different models .*given: 'another'"):
        load_transcoders([first, tmp_path / "other"])
    other.metadata["target_site"] = written(2)
    other.save(tmp_path / "apart")
    with pytest.raises(InputError, match="sites of one block"):
        load_transcoders([tmp_path / "apart"])
