"""`saescope report`: what evaluations say, as HTML and as Markdown."""

import html
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from dashboards.report_command import ReportConfig, report
from dashboards.reports.content import equal_distortion, metric_table, report_of
from dashboards.reports.measured import read_measured
from saescope.__main__ import main
from saescope.errors import InputError
from saescope.pieces import Chart, Section, Series, Table
from saescope.seals import write_sealed
from tests.evaluations import make_evaluation
from tests.sealing import change_sealed

GRID = [(64, 4, 0.4, 30.0), (64, 8, 0.3, 55.0), (256, 4, 0.3, 40.0), (256, 8, 0.2, 70.0)]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four SAEs, "one" with the tables of families, and "other", measured otherwise."""
    root = tmp_path_factory.mktemp("reports")
    members = {}
    for d_sae, l0, fvu, bits in GRID:
        members[f"w{d_sae}-{l0}"] = {}
        folder = root / "sweep" / f"w{d_sae}-{l0}"
        make_evaluation(folder, d_sae=d_sae, l0=l0, fvu=fvu, bits=bits)
    write_sealed(root / "sweep" / "members.json", {"schema": 2, "members": members})
    make_evaluation(root / "one", tables=True)
    make_evaluation(root / "other", rows=77)
    return root


@pytest.fixture
def root(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    copy = Path(shutil.copytree(made, tmp_path / "copy"))
    monkeypatch.chdir(copy)
    return copy


class Strict(HTMLParser):
    """Tags that are opened and closed in order, and the texts between them."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def parsed(path: Path) -> Strict:
    page = Strict()
    page.feed(path.read_text())
    page.close()
    assert page.open == []
    return page


def test_one_page_that_needs_nothing_else(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", "one"]) == 0
    assert capsys.readouterr().out == "report.html: 1 SAE\n"
    page = parsed(root / "report.html")
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "link", "img", "iframe", "object", "a"}
    assert not [a for _, attributes in page.seen for a in attributes if a.startswith("on")]
    assert "url(" not in (root / "report.html").read_text()
    assert "default-src 'none'; style-src 'unsafe-inline'" in html.unescape(
        (root / "report.html").read_text()
    )
    assert {"svg", "table", "details"} <= tags
    titles = [text for text in page.texts if text in ("How often features fire", "Probing")]
    assert titles == ["How often features fire", "Probing"]
    cells = "|".join(page.texts)
    assert "0.2500 ± 0.0100" in cells
    assert "undefined: no early positions" in cells
    assert "0.1250 ± unknown: too few documents" in cells
    assert "0.7000 ± 0.0200" in cells, "of the probing table"
    assert (root / "report.html").stat().st_size < 60_000


def test_charts_are_drawn_where_their_numbers_are(root: Path) -> None:
    report(ReportConfig(run="one"))
    text = (root / "report.html").read_text()
    (chart,) = re.findall(r'<svg[^>]*aria-label="FVU by position">.*?</svg>', text)
    dots = [float(y) for y in re.findall(r'<circle cx="[\d.]+" cy="([\d.]+)"', chart)]
    assert len(dots) == 3
    # FVU 0.125, 0.25, 0.275: heights are as far apart as the values
    assert (dots[0] - dots[1]) / (dots[1] - dots[2]) == pytest.approx(5, rel=0.02)
    (chart,) = re.findall(r'<svg[^>]*aria-label="Absorption by first letter">.*?</svg>', text)
    bars = [float(each) for each in re.findall(r'height="([\d.]+)" fill', chart)]
    assert bars[1] == pytest.approx(2 * bars[0], rel=0.01), "S 0.5, A 0.25"
    assert len(bars) == 3, "and A of the untrained SAE"


def test_markdown_has_the_numbers_of_charts(root: Path) -> None:
    assert main(["report", "one", "--out", "one.md"]) == 0
    text = (root / "one.md").read_text()
    for line in (
        "| FVU | 0.2500 ± 0.0100 | lower |",
        "| 2–3 | 0.2500 ± 0.0200 |",
        "| 0.001 to 0.00178 | 9 |",
        "| sae | 0.7000 ± 0.0200 | 0.8000 ± 0.0200 |  | the SAE's features |",
        "| S | 0.500 |  |",
        "| city's country | sae | 4 | 50.0% | 75.0% | 0.625 |",
        "| sae | +0.250 ± 0.125 |  |",
        "| sae | test | 2 | 4 | +0.5000 | -0.2500 |",
    ):
        assert line in text, line
    tables = re.findall(r"((?:^\|.*\n)+)", text, re.MULTILINE)
    for table in tables:
        assert len({line.count("|") - line.count("\\|") for line in table.splitlines()}) == 1


def _write_controls(folder: Path, *, evaluation: str | None = None) -> None:
    found = json.loads((folder / "evaluation.json").read_text())
    values = {
        "trained": {"fvu": 0.25, "fvu_interval": 0.01, "probing_auc_k1": 0.7},
        "random": {"fvu": 0.26, "fvu_interval": 0.01, "probing_auc_k1": 0.5},
        "pca": {"fvu": 0.5, "fvu_interval": 0.01},
    }
    ranks = {
        "fvu": {"random": "cannot tell", "pca": "right"},
        "probing_auc_k1": {"random": "right"},
        "l0": {},
    }
    content = {"schema": 1, "kind": "controls", "values": values, "ranks": ranks}
    of = evaluation or found["protocol_hash"]
    write_sealed(folder / "controls.json", {**content, "evaluation": of})


def test_controls_are_shown_with_what_each_metric_tells(root: Path) -> None:
    assert main(["report", "one", "--out", "without.md"]) == 0
    assert "Controls" not in (root / "without.md").read_text()
    _write_controls(root / "one")
    assert main(["report", "one", "--out", "report.md"]) == 0
    text = (root / "report.md").read_text()
    at = text.index("### one: which controls its metrics tell")
    assert text.index("## Controls") < at < text.index("## Protocol")
    assert text[at:].splitlines()[2:6] == [
        "| metric | trained | random | pca | better | the metric |",
        "| --- | ---: | ---: | ---: | --- | --- |",
        "| FVU | 0.2500 ± 0.0100 | 0.2600 ± 0.0100 | 0.5000 ± 0.0100 | lower "
        "| cannot tell random |",
        "| probe AUC, k=1 | 0.7000 | 0.5000 | – | higher | ranks all right |",
    ]
    _write_controls(root / "one", evaluation="0" * 64)
    assert main(["report", "one", "--out", "other.md"]) == 0
    text = (root / "other.md").read_text()
    assert "controls.json: is of another evaluation than the one beside it" in text
    assert "## Controls" not in text


def test_columns_of_words_begin_at_the_left(root: Path) -> None:
    assert main(["report", "one", "--out", "report.md"]) == 0
    lines = (root / "report.md").read_text().splitlines()
    for head, aligned in (
        ("| metric | meaning |", "| --- | --- |"),
        ("| attribute | method | features | cause | isolation | disentangle |",
         "| --- | --- | ---: | ---: | ---: | ---: |"),
    ):  # fmt: skip
        assert lines[lines.index(head) + 1] == aligned
    assert main(["report", "one"]) == 0
    page = parsed(root / "report.html")
    kinds = {attributes.get("class") for tag, attributes in page.seen if tag == "td"}
    assert kinds == {None, "words", "names"}


def test_a_sweep_is_all_of_its_runs_and_says_which_width_is_best(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (root / "sweep" / "w64-8" / "evaluation.json").unlink()
    assert main(["report", "sweep", "--out", "sweep.html"]) == 0
    shown = capsys.readouterr()
    assert "sweep/w64-8 has not been measured, and is left out" in shown.err
    assert shown.out.splitlines()[0] == "sweep.html: 3 SAEs"
    make_evaluation(root / "sweep" / "w64-8", d_sae=64, l0=8, fvu=0.3, bits=55.0)
    assert main(["report", "sweep", "--out", "sweep.html", "--replace"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "sweep.html: 4 SAEs"
    assert second == (
        "At equal distortion, FVU 0.3000: d_sae 64: 55.0 bits a row at L0 8.0, "
        "d_sae 256: 40.0 bits a row at L0 4.0; fewest: d_sae 256."
    )
    page = parsed(root / "sweep.html")
    assert second in page.texts
    assert "FVU against L0" in page.texts
    assert [t for t in page.texts if t.startswith("Not comparable")] == []


def test_what_was_measured_otherwise_is_said_not_to_compare(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "one", "other"]) == 0
    assert "2 SAEs under 2 protocols, which do not compare" in capsys.readouterr().out
    page = parsed(root / "report.html")
    (warning,) = [t for t in page.texts if t.startswith("Not comparable")]
    assert "under 2 protocols" in warning
    assert ": one; " in warning
    at = page.texts.index("What differs")
    assert page.texts[at + 1 :][3:6] == ["rows", "1000", "77"]
    assert page.texts[at:].count("probing.seeds") == 1, "what is the same is told once"


def test_bits_of_other_protocols_are_not_compared(root: Path) -> None:
    make_evaluation(root / "a", d_sae=64, fvu=0.3)
    make_evaluation(root / "b", d_sae=256, fvu=0.3, rows=77)
    found = [read_measured(root / name / "evaluation.json", name) for name in "ab"]
    assert equal_distortion(found) == []
    (chart,) = [c for s in report_of(found).sections for c in s.charts if c.key == "bits"]
    assert [len(each.x) for each in chart.series] == [1, 1]
    make_evaluation(root / "c", d_sae=64, fvu=0.4, rows=77)
    found.append(read_measured(root / "c" / "evaluation.json", "c"))
    (chart,) = [c for s in report_of(found).sections for c in s.charts if c.key == "bits"]
    names = [each.name.partition(", protocol")[0] for each in chart.series]
    assert names == ["d_sae 64", "d_sae 64", "d_sae 256"], "no line joins two protocols"


def floors(path: Path, protocol_hash: str, **smallest: float) -> None:
    """A reliability.json with these smallest differences."""
    found = {name: {"smallest_difference": value} for name, value in smallest.items()}
    about = {"kind": "reliability", "schema": 1, "protocol_hash": protocol_hash}
    write_sealed(path, {**about, "runs": [{}] * 5, "floors": found})


def test_sees_what_is_better_as_far_as_it_can_be_told(root: Path) -> None:
    make_evaluation(root / "b", fvu=0.24, l0=8.5, bits=10.0)
    make_evaluation(root / "c", fvu=0.125)
    make_evaluation(root / "a")

    def found() -> Section | None:
        names = ("a", "b", "c", "other")
        read = [read_measured(root / name / "evaluation.json", name) for name in names]
        titles = {section.title: section for section in report_of(read).sections}
        return titles.get("Beside a")

    section = found()
    assert section is not None
    assert section.words[0].startswith("By the intervals of both figures")
    better = "FVU, KL"  # delta CE has no interval, 0.24 is within those of FVU
    assert section.tables[0].rows == (("b", "", "", ""), ("c", better, "", ""))
    protocol = read_measured(root / "a" / "evaluation.json", "a").protocol_hash
    floors(root / "reliability.json", protocol, fvu=0.005, l0=0.1)
    section = found()
    assert section is not None
    assert section.words[0] == "By what 5 seeds of one recipe differ in (reliability.json)."
    assert section.tables[0].rows == (("b", "FVU", "", "L0"), ("c", "FVU", "", ""))
    floors(root / "reliability.json", "of something else", fvu=0.005)
    section = found()
    assert section is not None
    assert section.words[0].startswith("By the intervals"), "of another protocol"
    (root / "reliability.json").write_text("{}")
    section = found()
    assert section is not None
    assert "reliability.json: is no reliability of metrics" in section.words[0]
    assert "Beside one" not in {
        each.title
        for each in report_of(
            [read_measured(root / name / "evaluation.json", name) for name in ("one", "other")]
        ).sections
    }


def test_of_many_saes_each_is_a_row(root: Path) -> None:
    found = [read_measured(root / "one" / "evaluation.json", name) for name in "abcde"]
    table = metric_table("reconstruction", found)
    assert table.columns[:3] == ("SAE", "L0 (features a row)", "FVU")
    assert [row[:3] for row in table.rows] == [(n, "8.00", "0.2500 ± 0.0100") for n in "abcde"]
    few = metric_table("reconstruction", found[:4])
    assert few.columns == ("metric", *"abcd", "better")
    lines = [c for s in report_of(found * 2).sections for c in s.charts if c.key == "densities"]
    assert len(lines[0].series) == 5


def test_what_is_wrong_beside_an_evaluation_is_said_and_the_rest_shown(root: Path) -> None:
    change_sealed(
        root / "one" / "evaluation.probing.json", lambda found: found.update(protocol_hash="0")
    )
    path = root / "one" / "evaluation.absorption.json"
    path.write_text(path.read_text().replace("0.25", "0.75"))
    found = read_measured(root / "one" / "evaluation.json", "one")
    assert set(found.families) == {"ravel", "scr", "unlearning"}
    assert [problem.partition(": ")[2] for problem in found.problems] == [
        "is of another evaluation than the one beside it",
        "its content does not match its own sha256",
    ]
    assert set(found.problems) < set(report_of([found]).words)


def test_wrong_input_is_one_clear_error(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "empty").mkdir()
    assert main(["report", "empty"]) == 2
    assert "empty: has not been measured; `saescope eval` does that" in capsys.readouterr().err
    with pytest.raises(
        InputError, match=r"no kind of report \(given: 'report.pdf'; allowed: .html"
    ):
        ReportConfig(run="one", out="report.pdf")
    path = root / "other" / "evaluation.json"
    path.write_text(path.read_text().replace("0.25", "0.15"))
    assert main(["report", "other"]) == 2
    assert "its content does not match its own sha256" in capsys.readouterr().err
    assert not (root / "report.html").exists()
    (root / "mine.html").write_text("<p>mine")
    with pytest.raises(InputError, match="holds something else than a report"):
        report(ReportConfig(run="one", out="mine.html", replace=True))
    report(ReportConfig(run="one"))
    report(ReportConfig(run="one", replace=True))
    with pytest.raises(InputError, match="holds a report already; --replace"):
        report(ReportConfig(run="one"))


def test_hostile_names_are_only_text(root: Path) -> None:
    name = "<script>alert(1)</script>|`x`"
    found = read_measured(root / "one" / "evaluation.json", name)
    from dashboards.reports import html_page, markdown

    page = Strict()
    page.feed(html_page.page(report_of([found, found])))
    assert "script" not in {tag for tag, _ in page.seen}
    assert "<script" not in markdown.text(report_of([found])).replace("\\<", "")
    assert "\\<script\\>alert(1)\\</script\\>\\|\\`x\\`" in markdown.text(report_of([found]))


def test_a_chart_as_a_table_by_hand() -> None:
    chart = Chart(
        key="x",
        title="t",
        x="k",
        y="AUC",
        series=(
            Series(name="a", x=(1.0, 4.0), y=(0.5, None), half=(0.25, None)),
            Series(name="b", x=(2.0,), y=(0.75,)),
        ),
        form=".2f",
    )
    assert chart.numbers() == Table(
        title="t",
        columns=("k", "a", "b"),
        rows=(("1", "0.50 ± 0.25", ""), ("2", "", "0.75"), ("4", "–", "")),
    )
    low, high, bottom, top = chart.bounds()
    assert (low, high) == (1.0, 4.0)
    assert bottom == 0.0
    assert bottom < 0.25 < 0.75 < top
