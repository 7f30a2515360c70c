"""The table of metrics: its rows, how values are written, and rows that a file carries."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from sae.evaluation.written import measured_values, report, rows_of, sections
from saescope import metrics
from saescope.errors import ArtefactError
from saescope.metrics import (
    Metric,
    common_rows,
    declare,
    described,
    measured_rows,
    metric,
    metric_table,
    shown_with_interval,
)
from store import FeatureStore
from tests.foreign_stores import altered
from tests.tiny_store import make_tiny_store

CARRIED = Metric(
    name="hoyer",
    label="Hoyer",
    unit="of 1",
    form=".1%",
    better="higher",
    help="Sparseness of a row.",
    source="Hoyer 2004, section 3.1",
    interval=True,
)


def test_every_row_says_what_it_is() -> None:
    rows = metric_table()
    assert {"l0", "fvu", "cosine", "norm_ratio", "dead_fraction", "delta_ce", "kl"} <= set(rows)
    assert len({row.label for row in rows.values()}) == len(rows), "labels tell metrics apart"
    for row in rows.values():
        assert row.help.endswith(".")
        assert not row.source.endswith(".")
    better = {name: row.better for name, row in rows.items()}
    assert (better["fvu"], better["cosine"], better["l0"]) == ("lower", "higher", "neither")


def test_values_and_intervals_are_written_in_one_form() -> None:
    assert CARRIED.title == "Hoyer (of 1)"
    assert CARRIED.about == ("Sparseness of a row. Higher is better. Hoyer 2004, section 3.1.")
    values = {"hoyer": 0.25, "hoyer_interval": 0.0125}
    assert shown_with_interval(CARRIED, values, unit=True) == "25.0% ± 1.2% of 1"
    assert shown_with_interval(CARRIED, {"hoyer": None}, unit=True) == "undefined: not measured"
    assert metric("fvu").shown(123456789.0) == "1.23e+08"
    assert [row.name for row in measured_rows({"kl": 1, "rows": 2, "l0": 3}, metric_table())] == [
        "l0",
        "kl",
    ], "in the table's order, without what is no metric"


@pytest.mark.parametrize("wrong", [{"name": "Not-a-name"}, {"form": ".999999999f"}, {"form": "x"}])
def test_rows_that_cannot_be(wrong: dict[str, str]) -> None:
    with pytest.raises(TypeError, match="metric"):
        Metric(**{**asdict(CARRIED), **wrong})


def test_no_metric_is_declared_twice() -> None:
    declare(metric("fvu"))
    with pytest.raises(TypeError, match="'fvu' is declared twice"):
        declare(Metric(**{**asdict(metric("fvu")), "label": "other"}))


def test_the_order_of_rows_does_not_depend_on_what_was_imported_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = Metric(**{**asdict(CARRIED), "name": "gini", "label": "Gini"})
    values = {"gini": 0.5, "kl": 1.0, "hoyer": 0.25, "l0": 3.0}
    for first, second in ((CARRIED, other), (other, CARRIED)):
        with monkeypatch.context() as patch:
            patch.setattr(metrics, "_TABLE", dict(metrics._TABLE))
            declare(first, second)
            assert [row["name"] for row in described(values)] == ["gini", "hoyer"]
            shown = [row.name for row in measured_rows(values, metric_table())]
            assert shown == ["l0", "kl", "gini", "hoyer"]


@pytest.mark.usefixtures("own_metrics")
def test_an_evaluation_carries_the_rows_that_this_package_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert described(["fvu", "l0"]) == []
    before = common_rows()
    declare(CARRIED)
    assert common_rows() == before, "help texts do not depend on what was imported"
    carried = json.loads(json.dumps(described(["fvu", "hoyer", "rows"])))
    assert [row["name"] for row in carried] == ["hoyer"]
    monkeypatch.setattr(
        metrics, "_TABLE", {k: v for k, v in metric_table().items() if k != "hoyer"}
    )
    evaluation = {
        "protocol": {"rows": 3},
        "protocol_hash": "0" * 64,
        "reconstruction": None,
        "hoyer": {"hoyer": 0.5, "hoyer_interval": None, "hoyer_by_site": {"a": 0.25}},
        "metrics": carried,
    }
    assert sections(evaluation) == {"hoyer": evaluation["hoyer"]}
    assert measured_values(evaluation) == evaluation["hoyer"]
    assert rows_of(evaluation)["hoyer"] == CARRIED
    assert report(evaluation)[1:] == [
        "  Hoyer  50.0% of 1 ± unknown: too few documents",
        "         25.0% at a",
    ]
    renamed = [{**asdict(metric("fvu")), "label": "better than it is"}]
    assert metric_table(renamed)["fvu"].label == "FVU"


HOSTILE = [
    "text",
    [3],
    [{"name": "hoyer"}],
    [{**asdict(CARRIED), "form": ".99999999f"}],
    [{**asdict(CARRIED), "label": 3}],
    [{**asdict(CARRIED), "label": "\x1b[2J"}],
    [{**asdict(CARRIED), "help": "long" * 1000}],
    [{**asdict(CARRIED), "interval": "yes"}],
    [{**asdict(CARRIED), "better": "always"}],
    [{**asdict(CARRIED), "name": "__class__"}],
]


@pytest.mark.parametrize("carried", HOSTILE)
def test_rows_of_a_file_are_not_believed(carried: object) -> None:
    with pytest.raises(ArtefactError, match=r"file\.json: damaged"):
        metric_table(carried, where="file.json")


def test_a_row_has_a_value_of_every_field() -> None:
    assert set(asdict(CARRIED)) == {field.name for field in fields(Metric)}


def test_a_store_is_read_with_the_rows_that_it_carries(tmp_path: Path) -> None:
    good = make_tiny_store(tmp_path)
    rows = json.dumps([asdict(CARRIED)]).replace("'", "''")
    insert = f"INSERT INTO meta VALUES ('metric_rows', '{rows}')"
    with FeatureStore.open(altered(good, tmp_path / "carries", [insert])) as store:
        assert store.overview().table["hoyer"] == CARRIED
    with FeatureStore.open(good) as store:
        assert store.overview().table == metric_table()
    damaged = altered(good, tmp_path / "damaged", ["INSERT INTO meta VALUES ('metric_rows', '3')"])
    with pytest.raises(ArtefactError, match=r"meta\.metric_rows: damaged"):
        FeatureStore.open(damaged)
