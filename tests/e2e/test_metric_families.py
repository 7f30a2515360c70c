"""A family of metrics in a file of its own: in the report, on disk, on the card, on the page."""

import importlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import streamlit as st
import torch

import sae
from activations import ActivationStore
from dashboards import find_stores
from sae.commands.evaluate import EvaluateConfig, evaluate
from sae.data.harvests import held_out_rows
from sae.evaluation import chosen, families, metric_family
from sae.evaluation.rows import RowSums
from sae.formats.card import model_card
from saescope.config import from_dict
from saescope.errors import InputError
from saescope.metrics import metric_table
from tests.e2e.test_explorer import open_page, shown
from tests.tiny import make_tiny_harvest, make_tiny_model

SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")
LARGEST = '''
"""The largest activation on a row, on average."""

from sae.evaluation import metric_family
from sae.evaluation.rows import RowSums
from saescope.metrics import Metric

LARGEST = Metric(name="largest", label="largest", unit="a row", form=".3f", better="neither",
                 help="Mean of the largest activation on a row.")


@metric_family("largest", needs="activations", metrics=(LARGEST,), protocol={"power": 1})
class Largest(RowSums):
    def __init__(self, setting):
        super().__init__(setting)
        self.total = 0.0

    def add(self, rows):
        self.total += float(rows.codes.dense().amax(1).double().sum())

    def values(self, counted):
        return {"largest": self.total / counted.rows}
'''
CERTAIN = '''
"""How sure the model is with the SAE in it."""

from sae.evaluation import metric_family
from saescope.metrics import Metric

SURE = Metric(name="sure", label="sureness", form=".1%", better="higher", interval=True,
              help="Mean of the largest probability.")


@metric_family("certain", needs="model", metrics=(SURE,))
def certain(given):
    splice = given.splice()
    with splice.reading(given.keep):
        given.model.logits(given.tokens)
    with splice.replacing(given.replacement, given.keep):
        logits = given.model.logits(given.tokens)
    chance = logits[given.keep].softmax(-1).amax(-1)
    return {"sure": float(chance.mean()), "sure_interval": None}
'''


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a harvest at two sites, an SAE of one and an SAE of both."""
    folder = tmp_path_factory.mktemp("families")
    model = make_tiny_model(folder / "model")
    harvest = make_tiny_harvest(folder, model, sites=SITES)
    common = {"harvest": str(harvest), "sae": {"kind": "topk", "d_sae": 48, "k": 4}}
    for name, where in (
        ("one", {"site": SITES[0]}),
        ("both", {"sites": list(SITES), "mix_layers": "all"}),
    ):
        settings = {**common, **where, "out": str(folder / name), "trainer": {"batch_size": 64}}
        sae.train(from_dict(sae.TrainConfig.specialise({}), settings, "test"))
    return folder


@pytest.fixture
def plugins(own_metrics: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two files with a family each, imported; afterwards neither is known."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    for name, text in (("family_largest", LARGEST), ("family_certain", CERTAIN)):
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(folder))
    for name in ("family_largest", "family_certain"):
        monkeypatch.delitem(sys.modules, name, raising=False)
        importlib.import_module(name)
    yield
    for name in ("family_largest", "family_certain"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("plugins")
def test_a_family_is_added_by_adding_its_file(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(work / "one", run)
    found = evaluate(EvaluateConfig(run=str(run), tokens=150))
    said = capsys.readouterr().out
    autoencoder = sae.load(run)
    rows = torch.cat(list(held_out_rows(ActivationStore.open(work / "harvest"), SITES[0], None)()))
    wanted = float(autoencoder.encode(rows).detach().amax(1).double().mean())
    assert found["largest"]["largest"] == pytest.approx(wanted, rel=1e-6)
    assert re.search(rf"  largest +{wanted:.3f} a row", said)
    assert 0 < found["certain"]["sure"] < 1
    assert f"{found['certain']['sure']:.1%} ± unknown: too few documents" in said
    assert found["protocol"]["largest"] == {"power": 1}
    written = json.loads((run / "evaluation.json").read_text())
    assert written["largest"] == found["largest"]
    carried = {row["name"]: row for row in written["metrics"]}
    assert carried["largest"]["label"] == "largest"
    assert carried["sure"]["interval"]
    sae.index(sae.IndexConfig(run=str(run), out=str(tmp_path / "stores" / "tiny")))
    # where nobody knows the family, what it measured still has its name
    monkeypatch.undo()
    assert "largest" not in metric_table()
    card = model_card(autoencoder, address="hf://me/saes", to="saescope", metrics=written)
    assert f"| largest (a row) | {wanted:.3f} | Mean of the largest activation on a row. |" in card
    assert "name: sureness" in card
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path / "stores"))
    st.cache_resource.clear()
    page = shown(open_page())
    assert "largest (a row)" in page
    assert f"{wanted:.3f}" in page
    assert "sureness" in page
    assert f"{found['certain']['sure']:.1%}" in page
    st.cache_resource.clear()
    st.cache_data.clear()


@pytest.mark.usefixtures("plugins")
def test_at_several_layers_a_family_is_the_mean_of_its_sites(work: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"run": str(work / "both"), "metrics": ("largest",)}
    both = evaluate(EvaluateConfig(**options, out=str(tmp_path / "both.json")))
    each = [
        evaluate(EvaluateConfig(**options, site=site, out=str(tmp_path / f"{site}.json")))
        for site in SITES
    ]
    mean = sum(one["largest"]["largest"] for one in each) / 2
    assert both["largest"]["largest"] == pytest.approx(mean)
    assert both["largest"]["rows"] == sum(one["largest"]["rows"] for one in each)


def test_families_are_chosen_by_name(work: Path, tmp_path: Path) -> None:
    assert {"density", "reconstruction", "downstream"} <= set(families())
    needs = [family.needs for family in families().values()]
    assert needs == sorted(needs), "those that need the model come last"
    whole = evaluate(EvaluateConfig(run=str(work / "one"), out=str(tmp_path / "whole.json")))
    density = evaluate(
        EvaluateConfig(
            run=str(work / "one"), metrics=("density",), out=str(tmp_path / "density.json")
        )
    )
    names = [
        "rows",
        "documents",
        "l0",
        "l0_interval",
        "dead_fraction",
        "dense_fraction",
        "density_histogram",
    ]
    assert density["reconstruction"] == {name: whole["reconstruction"][name] for name in names}
    assert density["downstream"] is None
    effect = evaluate(
        EvaluateConfig(
            run=str(work / "one"), metrics=("downstream",), out=str(tmp_path / "effect.json")
        )
    )
    assert effect["downstream"] == whole["downstream"]
    assert effect["reconstruction"] is None
    hashes = {one["protocol_hash"] for one in (whole, density, effect)}
    assert len(hashes) == 3


def test_wrong_choices_are_refused(work: Path) -> None:
    with pytest.raises(InputError, match=r"no such family .*density.*reconstruction.*downstream"):
        evaluate(EvaluateConfig(run=str(work / "one"), metrics=("density", "fvu")))
    for run, tokens, why in (("one", 0, "tokens is 0"), ("both", 150, "of several layers")):
        with pytest.raises(InputError, match=f"metrics: what needs the model .*{why}"):
            evaluate(EvaluateConfig(run=str(work / run), tokens=tokens, metrics=("downstream",)))


@pytest.mark.usefixtures("plugins")
def test_a_family_is_registered_once_and_fits_what_it_needs() -> None:
    with pytest.raises(TypeError, match="'largest' is registered twice"):
        metric_family("largest", needs="model", metrics=())(lambda given: {})
    with pytest.raises(TypeError, match="activations need a RowSums class"):
        metric_family("other", needs="activations", metrics=())(lambda given: {})
    with pytest.raises(TypeError, match="model need"):
        metric_family("other", needs="model", metrics=())(RowSums)
    names = [family.name for family in chosen(())]
    order = [names.index(name) for name in ("largest", "reconstruction", "certain", "downstream")]
    assert order == sorted(order)
