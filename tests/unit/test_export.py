"""Exports of features: what is in the files is what is in the store."""

import csv
import gzip
import html
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dashboards.feature_html import features_page, histogram_svg
from saescope.__main__ import main
from saescope.errors import InputError
from store import Annotations, FeatureStore
from store.database import Database
from store.export import record as records
from store.export.record import read_record, read_records
from store.machine_labels import MachineLabel
from store.results import Histogram
from store.selection import choose_features, parse_features
from tests.facts_store import make_facts_store
from tests.tiny_store import CONTEXT, DEAD, EVERYWHERE, RARE, WORDS, make_rows, make_tiny_store

BOTH = f"{RARE},{EVERYWHERE}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_tiny_store(tmp_path_factory.mktemp("stores"))
    with Annotations.open(path) as notes:
        notes.set_label(RARE, "once <only>")
        notes.set_note(RARE, "a note")
        notes.set_machine_labels(
            [MachineLabel(feature=RARE, method="token", label="on <x>", score=0.75)]
        )
        notes.add_to_list(RARE, "mine")
        notes.add_to_list(EVERYWHERE, "mine")
    return path


def run(made: Path, out: Path, *words: str) -> Path:
    assert main(["export", str(made), "--out", str(out), *words]) == 0
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in data.splitlines()]


def active(feature: int) -> dict[int, float]:
    """Where the feature is active, by position, as it was given to the store."""
    rows = make_rows()
    mine = rows.feature == feature
    return dict(zip(rows.position[mine].tolist(), rows.activation[mine].tolist(), strict=True))


def test_neuronpedia(made: Path, tmp_path: Path) -> None:
    out = run(
        made, tmp_path / "np", "--format", "neuronpedia", "--features", f"{RARE},{EVERYWHERE}"
    )
    [source] = lines(out / "source.jsonl")
    assert source["id"] == "1-tiny"  # of blocks.1.hook_resid_post
    assert (source["modelId"], source["setName"]) == ("tiny-llama", "tiny")
    [sourceset], [release] = lines(out / "sourceset.jsonl"), lines(out / "release.jsonl")
    assert sourceset["name"] == source["setName"]
    assert sourceset["releaseName"] == release["name"]
    assert lines(out / "model.jsonl")[0]["id"] == source["modelId"]
    rare, everywhere = lines(out / "features" / "batch-0.jsonl.gz")
    assert (rare["index"], rare["layer"], rare["modelId"]) == (str(RARE), "1-tiny", "tiny-llama")
    assert rare["maxActApprox"] == 1.5
    assert rare["frac_nonzero"] == pytest.approx(1 / make_rows().keep.sum(), rel=1e-5)
    assert rare["freq_hist_data_bar_heights"] == [0] * 39 + [1]
    assert rare["freq_hist_data_bar_values"][-1] == pytest.approx(1.5 * 39.5 / 40)
    assert rare["pos_str"] == [WORDS[(RARE + r) % len(WORDS)] for r in range(5)]
    assert rare["pos_values"] == [2.0, 1.9, 1.8, 1.7, 1.6]
    assert rare["neg_values"] == [-2.0, -1.9, -1.8, -1.7, -1.6]
    assert rare["topkCosSimIndices"] == [RARE + 1, RARE + 2, RARE + 3]
    assert rare["topkCosSimValues"] == [0.75, 0.5, 0.25]
    assert everywhere["frac_nonzero"] == 1.0
    explanation, machine = lines(out / "explanations" / "batch-0.jsonl.gz")
    assert machine["description"] == "on <x>"
    assert machine["notes"] == "saescope, machine label (token, balanced accuracy 0.750)"
    assert machine["id"] != explanation["id"]
    assert (explanation["index"], explanation["description"]) == (str(RARE), "once <only>")


def test_activations_of_neuronpedia(made: Path, tmp_path: Path) -> None:
    out = run(
        made, tmp_path / "np", "--format", "neuronpedia", "--features", f"{RARE},{EVERYWHERE}"
    )
    found = lines(out / "activations" / "batch-0.jsonl.gz")
    assert len({row["id"] for row in found}) == len(found)
    # active once, so its strongest example and the only one of its intervals are the same
    top, interval = [row for row in found if row["index"] == str(RARE)]
    values = [0.0] * CONTEXT
    values[5] = 1.5
    assert top["values"] == interval["values"] == values
    assert (top["maxValue"], top["maxValueTokenIndex"], top["minValue"]) == (1.5, 5, 0.0)
    assert top["qualifyingTokenIndex"] == 5
    assert (top["binMin"], top["binMax"], top["binContains"]) == (-1.0, 1.5, -1.0)
    kept = int(make_rows().keep.sum())
    assert (interval["binMin"], interval["binMax"]) == (1.2, 1.5)
    assert interval["binContains"] == pytest.approx(1 / kept, rel=1e-5)
    ids = make_rows().tokens[2]
    words = [WORDS[i] for i in ids]
    assert [t for t, w in zip(top["tokens"], words, strict=True) if isinstance(w, str)] == [
        w for w in words if isinstance(w, str)
    ]
    # intervals of one feature are disjoint, without zero, and hold all of its positions
    mine = [row for row in found if row["index"] == str(EVERYWHERE) and row["binMin"] >= 0]
    bins = {(row["binMin"], row["binMax"]): row["binContains"] for row in mine}
    assert sum(bins.values()) == pytest.approx(1.0, rel=1e-4)
    for row in mine:
        peak = row["values"][row["qualifyingTokenIndex"]]
        assert row["binMin"] < peak <= row["binMax"]


def test_saedashboard(made: Path, tmp_path: Path) -> None:
    out = run(made, tmp_path / "sd", "--format", "saedashboard", "--list", "mine", "--layer", "7")
    batch = json.loads((out / "batch-0.json").read_text())
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("tiny-llama", 7, "tiny")
    rare, everywhere = batch["features"]
    assert [rare["feature_index"], everywhere["feature_index"]] == [RARE, EVERYWHERE]
    assert (rare["n_prompts_total"], rare["n_tokens_in_prompt"]) == (40, CONTEXT)
    firing = active(EVERYWHERE)
    assert sum(everywhere["freq_hist_data_bar_heights"]) == len(firing)
    top = [each for each in everywhere["activations"] if each["bin_min"] == -1]
    strongest = {}
    for position, value in firing.items():  # of each sequence
        strongest[position // CONTEXT] = max(strongest.get(position // CONTEXT, 0.0), value)
    expected = sorted(strongest.values(), reverse=True)[:20]
    assert [each["values"][each["qualifying_token_index"]] for each in top] == expected


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables(made: Path, tmp_path: Path, kind: str) -> None:
    out = run(made, tmp_path / kind, "--format", kind, "--features", f"{RARE},{DEAD[0]}")

    def table(name: str) -> list[dict[str, Any]]:
        if kind == "parquet":
            return pq.read_table(out / f"{name}.parquet").to_pylist()
        with (out / f"{name}.csv").open(newline="") as stream:
            return list(csv.DictReader(stream))

    dead, rare = table("features")
    assert [int(dead["feature"]), int(rare["feature"])] == [DEAD[0], RARE]
    assert (int(dead["n_active"]), int(rare["n_active"])) == (0, 1)
    assert (rare["label"], rare["note"], float(rare["max"])) == ("once <only>", "a note", 1.5)
    assert float(rare["encoder_bias"]) == pytest.approx(float(np.linspace(-1, 1, 64)[RARE]))
    examples = table("examples")
    assert [each["kind"] for each in examples] == ["top", "interval"]
    assert {int(each["position"]) for each in examples} == {2 * CONTEXT + 5}
    values = examples[0]["activations"]
    values = json.loads(values) if kind == "csv" else values
    assert values == [0.0] * 5 + [1.5] + [0.0] * 10
    [row] = table("histogram")
    assert (float(row["high"]), int(row["count"])) == (1.5, 1)
    cosines = {
        int(r["other"]): float(r["cosine"])
        for r in table("neighbours")
        if int(r["feature"]) == RARE
    }
    assert cosines == {RARE + 1: 0.75, RARE + 2: 0.5, RARE + 3: 0.25}
    raised = [r for r in table("logits") if int(r["feature"]) == RARE and int(r["sign"]) == 1]
    assert [int(r["token_id"]) for r in raised] == [(RARE + r) % len(WORDS) for r in range(5)]
    assert len(table("coactivation")) > 0


def test_html(made: Path, tmp_path: Path) -> None:
    out = run(made, tmp_path / "pages.html", "--list", "mine")
    text = out.read_text()
    assert "once &lt;only&gt;" in text
    assert "<only>" not in text
    assert "on &lt;x&gt; · machine label, score 0.75" in text
    assert "<b>bold</b>" not in text, "a token is no markup"
    assert "fires at 100 % of positions" in text
    # nothing to be fetched: no script, no address but those of sections of the page itself
    assert "<script" not in text
    assert "default-src &#x27;none&#x27;" in text or "default-src 'none'" in text
    assert set(re.findall(r'(?:href|src)="([^"]*)"', text)) == {f"#f{RARE}", f"#f{EVERYWHERE}"}
    assert "url(" not in text
    assert "@import" not in text


def test_pages_and_their_index(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = run(made, tmp_path / "pages", "--features", f"{RARE},{DEAD[0]}")
    names = {path.name for path in out.iterdir()}
    pages = {f"feature-{RARE}.html", f"feature-{DEAD[0]}.html"}
    assert names == {"index.html", "manifest.json", *pages}
    assert set(re.findall(r'href="([^"]*)"', (out / "index.html").read_text())) == pages
    assert "Never fires" in (out / f"feature-{DEAD[0]}.html").read_text()
    assert f'<iframe src="pages/feature-{RARE}.html"' in capsys.readouterr().out


@pytest.mark.parametrize("form", ["neuronpedia", "saedashboard", "csv", "parquet", "html"])
@pytest.mark.parametrize("which", ["tiny", "facts"])
def test_features_read_together_are_exported_as_one_by_one(
    made: Path, tmp_path: Path, form: str, which: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = made if which == "tiny" else make_facts_store(tmp_path)
    words = ["--format", form, "--features", "3,0-2" if which == "facts" else f"0-11,{RARE}"]
    words += ["--layer", "1"] if form in ("neuronpedia", "saedashboard") else []
    written = []
    for most in (1, 5, 64):  # 5: the last batch is a smaller one
        monkeypatch.setattr(records, "_MOST_AT_ONCE", most)
        out = run(store, tmp_path / f"{form}-{most}", *words)
        files = sorted(p for p in out.rglob("*") if p.is_file() and p.name != "manifest.json")
        written.append({str(path.relative_to(out)): path.read_bytes() for path in files})
    assert len(written[0]) > 0
    assert written[0] == written[1] == written[2]


def test_queries_do_not_grow_with_features(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answer = Database._answer

    def count(self: Database, sql: str, values: Sequence[Any]) -> Any:
        asked.append(sql)
        return answer(self, sql, values)

    with FeatureStore.open(made) as store, Annotations.open(made) as notes:
        few, many = [EVERYWHERE], list(range(60))
        list(read_records(store, notes, few)), store.densities()
        monkeypatch.setattr(Database, "_answer", count)
        list(read_records(store, notes, few))
        once = len(asked)
        assert len(list(read_records(store, notes, many))) == 60
    assert len(asked) == 2 * once
    assert not any("= ?" in sql for sql in asked[once:])


def test_few_features_are_read_at_once_where_sequences_are_long(made: Path) -> None:
    with FeatureStore.open(made) as store:
        assert records._at_once(store) == 64
        store.context = 8192  # 45 examples a feature, 2**20 tokens
        assert records._at_once(store) == 2
        store.context = 1 << 20
        assert records._at_once(store) == 1


def test_a_record_is_what_single_queries_say(made: Path) -> None:
    with FeatureStore.open(made) as store, Annotations.open(made) as notes:
        numbers = [RARE, EVERYWHERE, DEAD[0], 20]
        for number, found in zip(numbers, read_records(store, notes, numbers, 3), strict=True):
            top, spread = (store.examples(number, kind, 3) for kind in ("top", "interval"))
            assert found.feature == store.feature(number)
            assert found.top == top
            assert [e for interval in found.intervals for e in interval.examples] == spread
            assert found.logits == store.logits(number)
            assert found.neighbours == store.neighbours(number)
            assert found.coactivating == store.coactivating(number)
            assert found.annotation == notes.get(number)
            assert np.array_equal(found.histogram.counts, store.histogram(number).counts)
            others = [e.feature for e in [*found.neighbours, *found.coactivating]]
            assert found.top_tokens == store.top_tokens([number, *others], 3)
            assert found.labels == notes.labels([number, *others])


def test_the_histogram_has_each_bin_in_words(made: Path) -> None:
    drawn = histogram_svg(Histogram(np.array([0.0, 1.0, 2.0]), np.array([4, 1])))
    assert "<title>0.00 to 1.00: 4 positions</title>" in drawn
    heights = [float(h) for h in re.findall(r'height="([0-9.]+)" fill', drawn)]
    assert heights == [110.0, 55.0], "square roots of 4 and 1"


def test_a_page_names_relatives(made: Path) -> None:
    with FeatureStore.open(made) as store, Annotations.open(made) as notes:
        record = read_record(store, notes, RARE - 1, 4)
        text = features_page([record], store.overview(), "t")
    assert html.escape("once <only>") in text, "its neighbour's label"
    assert "cosine +0.75" in text


def test_what_is_there_is_replaced_only_if_asked(made: Path, tmp_path: Path) -> None:
    words = [
        "export",
        str(made),
        "--out",
        str(tmp_path / "x"),
        "--format",
        "csv",
        "--features",
        "3",
    ]
    assert main(words) == 0
    assert main(words) == 2
    assert main([*words, "--replace"]) == 0
    (tmp_path / "x" / "mine.txt").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    assert main([*words[:3], str(tmp_path / "other"), *words[4:], "--replace"]) == 2
    assert (tmp_path / "other" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "5-3", "64", "1,,2", "1.5", "²", "9" * 20])
def test_no_choice_of_features(text: str) -> None:
    with pytest.raises(InputError, match="features"):
        parse_features(text, 64)


def test_choosing_features(made: Path) -> None:
    with FeatureStore.open(made) as store, Annotations.open(made) as notes:
        live = choose_features(store, notes, None, None)
        assert live == sorted(set(make_rows().feature.tolist()))
        assert choose_features(store, notes, None, "mine") == [RARE, EVERYWHERE]
        with pytest.raises(InputError, match=r"no such list.*mine"):
            choose_features(store, notes, None, "yours")
        with pytest.raises(InputError, match="not both"):
            choose_features(store, notes, "3", "mine")


def test_a_site_without_a_layer_needs_one(made: Path, tmp_path: Path) -> None:
    with FeatureStore.open(made) as store, Annotations.open(made) as notes:
        store.meta["site"] = "hook_embed"
        from store.export.saedashboard import write_saedashboard

        with pytest.raises(InputError, match="--layer"):
            list(write_saedashboard(tmp_path, store, notes, [3]))
