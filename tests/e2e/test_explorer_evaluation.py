"""The explorer's page Evaluation: what was measured on SAEs, side by side."""

import json
import shutil
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from dashboards import evaluations
from tests.e2e.test_explorer import links, open_page, parameter, shown
from tests.e2e.test_explorer_runs import chart, folder, made, make_run
from tests.evaluations import make_evaluation

__all__ = ["folder", "made"]  # fixtures

PAGE = "evaluation"


def measured_run(folder: Path, name: str, **values: object) -> Path:
    run = make_run(folder / "runs" / name, evaluated=False)
    make_evaluation(run, **values)  # type: ignore[arg-type]
    return run


def tables(app: AppTest) -> list[list[list[str]]]:
    """The rows of all tables of the page, their columns first."""
    return [[list(each.value.columns), *each.value.to_numpy().tolist()] for each in app.dataframe]


def cell(app: AppTest, row: str, column: str) -> str:
    """The value of a metric in the first table that has it."""
    for each in app.dataframe:
        names = each.value.iloc[:, 0].tolist()
        if row in names and column in each.value:
            return each.value[column].tolist()[names.index(row)]
    raise AssertionError(row)


def test_several_side_by_side_from_a_link(folder: Path) -> None:
    measured_run(folder, "a", tables=True)
    measured_run(folder, "b", fvu=0.5, l0=4.0, d_sae=256)
    measured_run(folder, "c", rows=77)
    app = open_page(PAGE, saes="a,b")
    assert app.multiselect[0].value == ["a", "b"]
    assert parameter(app, "saes") == "a,b"
    assert (cell(app, "FVU", "a"), cell(app, "FVU", "b")) == ("0.2500 ± 0.0100", "0.5000 ± 0.0100")
    assert cell(app, "delta CE (nats)", "b") == "0.2500 ± unknown: too few documents"
    assert cell(app, "sae", "k = 4") == "0.8000 ± 0.0200", "of probing"
    assert not app.warning, "measured alike"
    assert "d_sae 64" in shown(app).replace("\\", ""), "the widths at equal distortion"
    (series,) = chart(app, "evaluation_fvu_against_l0")["data"]
    assert sorted(zip(series["x"], series["y"], strict=True)) == [(4.0, 0.5), (8.0, 0.25)]
    (first, second) = chart(app, "evaluation_by_position")["data"]
    assert (first["y"], second["name"]) == (pytest.approx([0.125, 0.25, 0.275]), "b")
    (bars, other) = chart(app, "evaluation_letters")["data"]
    assert (bars["y"], other["name"]) == ([0.25, 0.5], "a, untrained")
    app.multiselect[0].set_value(["a", "c"]).run()
    assert parameter(app, "saes") == "a,c"
    (warning,) = app.warning
    assert "Not comparable: these were measured under 2 protocols" in warning.value.replace(
        "\\", ""
    )
    assert ["rows", "1000", "77"] in [row for table in tables(app) for row in table]
    assert len(app.get("download_button")) == 2


def test_a_store_without_its_run_shows_what_it_carries(folder: Path) -> None:
    app = open_page(PAGE)
    assert parameter(app, "saes") == "tiny"
    assert cell(app, "FVU", "value") == "0.1875"
    assert "As it was when its store was made" in shown(app)


def test_where_nothing_was_measured_the_command_is_said(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(folder / "runs" / "a", evaluated=False)
    monkeypatch.setattr(evaluations, "is_measured", lambda _: False)
    app = open_page(PAGE)
    assert "No SAE here has been measured" in app.info[0].value
    assert [code.value for code in app.code] == ["saescope eval RUN"]
    assert not app.multiselect
    monkeypatch.undo()
    monkeypatch.setenv("SAESCOPE_STORE", str(folder / "stores"))
    app = open_page(PAGE, saes="a")
    assert app.multiselect[0].value == ["tiny"], "one that was measured"
    assert "The address has what makes no sense here: saes" in app.warning[0].value
    make_evaluation(run)
    assert open_page(PAGE, saes="a").multiselect[0].value == ["a"]


def test_a_damaged_evaluation_is_a_sentence_and_the_others_are_shown(folder: Path) -> None:
    measured_run(folder, "good")
    path = measured_run(folder, "bad") / "evaluation.json"
    path.write_text(path.read_text().replace("0.25", "0.15"))
    app = open_page(PAGE, saes="bad,good")
    (error,) = app.error
    assert "its content does not match its own sha256" in error.value
    assert str(path) in error.value.replace("\\", "")
    assert cell(app, "FVU", "value") == "0.2500 ± 0.0100"
    path.write_text(json.dumps([1]))
    assert "is no evaluation" in open_page(PAGE, saes="bad").error[0].value
    path.write_text("{ torn")
    assert "not valid JSON" in open_page(PAGE, saes="bad").error[0].value


def test_a_damaged_table_beside_it_is_said_and_left_out(folder: Path) -> None:
    run = measured_run(folder, "a", tables=True)
    path = run / "evaluation.probing.json"
    path.write_text(path.read_text().replace("0.8", "0.9"))
    app = open_page(PAGE, saes="a")
    assert not app.error
    assert "evaluation.probing.json: its content does not match" in shown(app).replace("\\", "")
    assert "evaluation_probing" not in [each.key for each in app.get("plotly_chart")]
    assert "evaluation_letters" in [each.key for each in app.get("plotly_chart")]


def test_another_sae_chosen_above_is_shown(folder: Path) -> None:
    shutil.copytree(folder / "stores" / "tiny", folder / "stores" / "twin")
    app = open_page(PAGE, sae="tiny")
    assert app.multiselect[0].value == ["tiny"]
    app.selectbox[0].set_value("twin").run()
    assert app.multiselect[0].value == ["twin"]
    app.multiselect[0].set_value(["tiny", "twin"]).run()
    ways = dict(links(app))
    assert ways["Compare their features"] == "sae=tiny&other=twin"
