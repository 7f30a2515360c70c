"""`saescope circuit`: what it prints and writes, and what it says of wrong input."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from activations import load_model
from sae.circuits.attribute import Method, circuit
from sae.circuits.files import load
from sae.circuits.graph import FEATURE
from sae.commands.circuit import CircuitConfig, circuit_of_prompt
from saescope.__main__ import main
from saescope.errors import InputError
from tests.tiny import N_LAYERS, make_tiny_model
from tests.unit.test_circuit import TEXT, transcoder
from tests.unit.test_circuit_effects import saes


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and transcoders of each of its layers."""
    root = tmp_path_factory.mktemp("circuit")
    make_tiny_model(root / "model")
    for layer in range(N_LAYERS):
        made = transcoder(layer)
        made.metadata |= {"model": "tiny", "model_spec": str(root / "model")}
        made.save(root / "set" / f"layer-{layer}")
    return root


def run(folder: Path, **fields: Any) -> Any:
    given = {"run": str(folder / "set"), "prompt": TEXT, **fields}
    return circuit_of_prompt(CircuitConfig(**given))


def test_a_graph_is_printed_and_written(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = ["--out", str(tmp_path / "g.npz"), "--neuronpedia", str(tmp_path / "My Graph.json")]
    words = ["circuit", str(folder / "set"), "--prompt", TEXT, "--top", "3", *files]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "output " in shown
    assert "replacement score 0." in shown
    assert "edges: " in shown  # how far it is
    graph = load(tmp_path / "g.npz")
    lines = [line for line in shown.splitlines() if "%  " in line]
    assert len(lines) == 3
    assert lines[0].split()[1].rstrip(":") == graph.ids[int(graph.influence.argmax())]
    assert 0 < graph.facts["scores"]["replacement"] < 1
    assert graph.saes == ["blocks.0.mlp.hook_in", "blocks.1.mlp.hook_in", "blocks.2.mlp.hook_in"]
    made = json.loads((tmp_path / "My Graph.json").read_text())
    assert made["metadata"]["slug"] == "my-graph"
    assert len(made["nodes"]) == len(graph)
    assert main(words) == 2
    assert "holds a graph already" in capsys.readouterr().err
    assert main([*words, "--replace"]) == 0


def test_pruning_and_single_runs(folder: Path) -> None:
    small = run(folder)
    whole = run(folder, prune=1.0, edges=1.0)
    assert len(small.nodes_of(FEATURE)) < len(whole.nodes_of(FEATURE))
    one = run(folder, run=str(folder / "set" / "layer-1"))
    assert set(one.layer[one.nodes_of(FEATURE)].tolist()) <= {1}
    assert one.saes[1] == str(folder / "set" / "layer-1")


def test_outputs_against_another(folder: Path) -> None:
    found = run(folder, outputs=(" and",), against=" the")
    assert found.describe(len(found) - 1).startswith("output ' and -  the'")
    assert found.weight[-1] == 1


@pytest.mark.parametrize("method", ["gradient", "integrated"])
def test_plain_saes_are_taken_by_gradients(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], method: Method
) -> None:
    made = saes()[2]  # of the residual stream after the first block
    made.metadata |= {"model": "tiny", "model_spec": str(folder / "model")}
    made.save(tmp_path / "sae")
    words = ["circuit", str(tmp_path / "sae"), "--prompt", TEXT, "--outputs", " and"]
    out = ["--out", str(tmp_path / "g.json"), "--prune", "1", "--edges", "1"]
    assert main([*words, "--method", method, *out]) == 0
    graph = load(tmp_path / "g.json")
    assert graph.method == method
    assert graph.sites == ["blocks.0.hook_resid_post"]
    model = load_model(str(folder / "model"))  # in the precision that the command takes
    expected = circuit(model, [made], TEXT, method=method, outputs=[" and"])
    assert len(graph.nodes_of(FEATURE)) == len(expected.nodes_of(FEATURE)) > 8
    effects = {name: float(expected.influence[expected.index(name)]) for name in graph.ids}
    least = 1e-3 * float(np.abs(expected.influence).max())
    assert graph.influence.tolist() == pytest.approx(list(effects.values()), abs=least)
    another: Method = "integrated" if method == "gradient" else "gradient"
    other = circuit(model, [made], TEXT, method=another, outputs=[" and"])
    assert np.abs(other.influence - expected.influence).max() > 10 * least
    with pytest.raises(SystemExit):
        main([*words, "--method", "patching"])
    assert "'integrated'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"outputs": ("river rose",)}, "is not one token"),
        ({"against": " the"}, "give them"),
        ({"out": "graph.pt"}, r"ends in \.npz or \.json"),
        ({"neuronpedia": "???.json"}, "no letter or digit"),
        ({"prune": 1.5}, "prune"),
        ({"max_features": 0}, "max_features"),
    ],
)
def test_wrong_input_is_said(folder: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run(folder, **fields)


def test_files_are_looked_at_before_anything_is_computed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "g.npz").write_text("mine")
    monkeypatch.setattr("sae.commands.circuit.load_saes", lambda _: torch.zeros(0)[1])
    with pytest.raises(InputError, match="something else than a graph"):
        run(folder, out=str(tmp_path / "g.npz"))
