"""Every page of the explorer on a tiny store, without a browser."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import streamlit as st
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash

import dashboards
from dashboards import find_stores, launch
from saescope.errors import ArtefactError, InputError
from store import Annotations, FeatureStore
from tests.tiny_store import (
    CONTEXT,
    D_SAE,
    DEAD,
    EVERYWHERE,
    RARE,
    WORDS,
    make_rows,
    make_tiny_store,
)

APP = str(Path(dashboards.__file__).parent / "app.py")
OVERVIEW, FEATURES, FEATURE = "overview", "features", "feature"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny store's folder, made once."""
    return make_tiny_store(tmp_path_factory.mktemp("made")).parent


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of stores with one store in it, named tiny."""
    shutil.copytree(made, tmp_path / "tiny")
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path))
    yield tmp_path
    st.cache_resource.clear()
    st.cache_data.clear()


def open_page(page: str = OVERVIEW, **parameters: str) -> AppTest:
    app = AppTest.from_file(APP, default_timeout=60)
    for name, value in parameters.items():
        app.query_params[name] = value
    app.run()
    if page != OVERVIEW:
        # AppTest.switch_page knows only pages that are scripts
        app._page_hash = calc_hash(page)
        for name, value in parameters.items():
            app.query_params[name] = value
        app.run()
    assert not app.exception, app.exception
    return app


def parameter(app: AppTest, name: str) -> str:
    """A parameter of the page's address."""
    value = app.query_params[name]
    return value[0] if isinstance(value, list) else value


def shown(app: AppTest) -> str:
    """The page's own HTML and Markdown."""
    html = [str(element.proto.body) for element in app.get("html")]
    return "\n".join([*html, *(m.value for m in app.markdown), *(c.value for c in app.caption)])


def links(app: AppTest) -> list[tuple[str, str]]:
    """Labels of the links, and the parameters they set."""
    return [(link.proto.label, link.proto.query_string) for link in app.get("page_link")]


def test_home_at_a_glance(folder: Path) -> None:
    with Annotations.open(folder / "tiny", sae_hash="5ae") as notes:
        notes.set_label(5, "<b>bold</b> *label*")
        notes.add_to_list(9)
    app = open_page()
    text = shown(app)
    assert app.markdown[0].value == "## Home"
    for name, value in (
        ("live features", f"{D_SAE - len(DEAD)} of {D_SAE}"),
        ("L0 (features a row)", "4.25"),
        ("FVU", "0.1875"),
        ("never fired (of features)", "4.7%"),
        ("delta CE (nats)", "0.0625"),
    ):
        assert f"<span>{name}</span><b>{value}</b>" in text
    assert "Fraction of variance unexplained" in text, "what it is stands beside it"
    assert "### tiny" in text
    assert "blocks.1.hook_resid_post" in text
    assert "3 dead features not shown" in text
    assert "25 documents, 640 tokens" in text
    assert "densities" in [chart.key for chart in app.get("plotly_chart")]
    labels = [label for label, _ in links(app)]
    assert any(label.startswith("★ 9  :gray[") for label in labels), "by its tokens, in grey"
    assert "5  \\<b\\>bold\\</b\\> \\*label\\*" in labels
    assert parameter(app, "sae") == "tiny"


def test_random_feature_from_the_overview(folder: Path) -> None:
    app = open_page()
    (button,) = [b for b in app.button if b.label == "Random feature"]
    button.click().run()
    assert not app.exception
    assert app.markdown[0].value.startswith("## Feature ")
    assert int(parameter(app, "feature")) not in DEAD


def test_feature_page(folder: Path) -> None:
    app = open_page(FEATURE, sae="tiny", feature=str(RARE))
    assert WORDS[make_rows().tokens[2, 5]] == "\t"
    assert app.markdown[0].value == f"## Feature {RARE} · :gray[→]", "its one token, in grey"
    text = shown(app)
    assert "strongest 1.50" in text
    assert "(1) · in 1 document ·" in text
    assert "sequence 2, position 5" in text
    assert "Title &lt;" in text
    assert text.count('class="ss-ex"') == 1
    assert "activations" in [chart.key for chart in app.get("plotly_chart")]
    assert not app.warning
    by_text = dict(links(app))
    near = [label for label in by_text if label.split()[0] in ("12", "13", "14")]
    assert len(near) >= 3
    assert any("feature=12" in query and "sae=tiny" in query for query in by_text.values())
    assert "+2.00" in text
    assert "-2.00" in text


def test_feature_page_by_interval_with_whole_sequences(folder: Path) -> None:
    app = open_page(FEATURE, feature=str(EVERYWHERE))
    assert shown(app).count('class="ss-ex"') == 20
    app.button_group(key="examples_kind").set_value("interval").run()
    text = shown(app)
    assert text.count('class="ss-ex"') == 25
    assert text.count(" positions (") >= 5
    app.select_slider(key="examples_window").set_value(None).run()
    text = shown(app)
    assert text.count("data-tip=") == 25 * CONTEXT
    app.toggle(key="examples_breaks").set_value(True).run()
    assert "<br>" in shown(app)
    assert not app.exception


def test_windows_stay_when_going_on(folder: Path) -> None:
    app = open_page(FEATURE, feature="0")
    app.select_slider(key="examples_window").set_value(4).run()
    (button,) = [b for b in app.button if b.label == "Next"]
    button.click().run()
    assert parameter(app, "feature") == "1"
    assert app.select_slider(key="examples_window").value == 4


def test_previous_next_and_go_to(folder: Path) -> None:
    app = open_page(FEATURE, feature="6")

    def press(label: str) -> None:
        (button,) = [b for b in app.button if b.label == label]
        button.click().run()
        assert not app.exception

    press("Next")
    assert app.markdown[0].value.startswith("## Feature 8 · :gray["), (
        "dead feature 7 is passed over"
    )
    press("Previous")
    assert app.markdown[0].value.startswith("## Feature 6 · :gray[")
    press("Random")
    assert int(parameter(app, "feature")) not in DEAD
    app.number_input(key="feature_number").set_value(33).run()
    assert app.markdown[0].value.startswith("## Feature 33 · :gray[")
    assert parameter(app, "feature") == "33"


def test_dead_feature(folder: Path) -> None:
    app = open_page(FEATURE, feature=str(DEAD[0]))
    assert "never fires" in app.info[0].value
    assert not app.get("plotly_chart")
    assert "+2.00" in shown(app), "its effects on the logits are shown all the same"


def test_labels_notes_and_favourites_are_saved(folder: Path) -> None:
    app = open_page(FEATURE, feature="20")
    app.text_input(key="label_tiny_20").set_value("a *new* <label>").run()
    assert app.markdown[0].value == "## Feature 20 · a \\*new\\* \\<label\\>"
    app.text_area(key="note_tiny_20").set_value("seen in §3").run()
    app.toggle(key="favourite_tiny_20").set_value(True).run()
    assert not app.exception
    with Annotations.open(folder / "tiny") as notes:
        assert (notes.get(20).label, notes.get(20).note) == ("a *new* <label>", "seen in §3")
        assert notes.members() == [20]
    app.toggle(key="favourite_tiny_20").set_value(False).run()
    with Annotations.open(folder / "tiny") as notes:
        assert notes.members() == []


def test_labels_of_a_read_only_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def touch(self: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "touch", touch)
    app = open_page(FEATURE, feature="20")
    field = app.text_input(key="label_tiny_20")
    assert field.disabled
    assert "read-only" in field.help


@pytest.mark.parametrize(
    ("raw", "number", "problem"),
    [
        ("abc", 0, "is not the number"),
        ("1000000000", D_SAE - 1, "Features go from"),
        ("-4", 0, "Features go from"),
        ("<script>alert(1)</script>", 0, "is not the number"),
        ("", 0, "is not the number"),
    ],
)
def test_wrong_feature_in_the_address(folder: Path, raw: str, number: int, problem: str) -> None:
    app = open_page(FEATURE, feature=raw)
    assert app.markdown[0].value.startswith(f"## Feature {number} · :gray[")
    assert problem in app.warning[0].value
    assert "<script" not in app.warning[0].value.replace("\\<script", "")
    assert parameter(app, "feature") == str(number), "the address is put right"


@pytest.mark.parametrize("raw", ["../../etc", "nothing", "/etc/passwd", "tiny/../tiny", ""])
def test_wrong_sae_in_the_address(folder: Path, raw: str) -> None:
    app = open_page(FEATURE, sae=raw, feature="5")
    assert "There is no SAE named" in app.warning[0].value
    assert app.markdown[0].value.startswith("## Feature 5 · :gray[")
    assert parameter(app, "sae") == "tiny"


def test_unknown_parameters_are_dropped(folder: Path) -> None:
    app = open_page(OVERVIEW, feature="3", evil="x" * 1000)
    assert set(app.query_params) == {"sae"}


def test_choice_between_stores(folder: Path) -> None:
    make_tiny_store(folder / "other", seed=1).parent.rename(folder / "second")
    app = open_page(FEATURE, feature="5")
    assert app.selectbox(key="sae_choice").options == ["second", "tiny"]
    app.selectbox(key="sae_choice").set_value("tiny").run()
    assert parameter(app, "sae") == "tiny"
    assert not app.exception
    app = open_page(FEATURE, sae="second", feature="5")
    with FeatureStore.open(folder / "second") as second:
        assert f"strongest {second.feature(5).max:.2f}" in shown(app)


def test_a_rebuilt_store_is_read_anew(folder: Path) -> None:
    before = shown(open_page(FEATURE, feature="5"))
    make_tiny_store(folder, seed=1)
    assert shown(open_page(FEATURE, feature="5")) != before


def test_no_store_is_a_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(find_stores.STORES_VARIABLE, str(tmp_path))
    app = open_page()
    assert "no feature store here" in app.error[0].value.replace("\\", "")


def test_only_what_was_named_or_is_beside_the_stores_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, away = tmp_path / "here" / "stores", tmp_path / "away"
    beside = tmp_path / "here" / "runs" / "a"
    for each in (stores, away, beside):
        each.mkdir(parents=True)
    link = tmp_path / "here" / "runs" / "link"
    link.symlink_to(away)

    def named(kind: str, own: str, *names: str) -> str:
        for name, value in find_stores.environment(
            str(stores), **{"model": (), "sae": (), kind: names}
        ).items():
            monkeypatch.setenv(name, value)
        with suppress(ArtefactError):
            return find_stores.source_to_load(kind, own, "the store")
        with pytest.raises(ArtefactError, match=f"start the explorer with --{kind}"):
            find_stores.source_to_load(kind, own, "the store")
        return ""

    assert named("sae", str(beside)) == str(beside)
    for own in (str(away), str(link), "hf://owner/repo", f"{beside}/../../../away", "gpt2", "~"):
        assert named("sae", own) == "", own
        assert named("model", own) == "", own
    assert named("model", "smollm2-135m") == "smollm2-135m"
    assert named("sae", "smollm2-135m") == ""
    assert named("sae", str(away), str(away)) == str(away)
    assert named("model", "gpt2", "gpt2", "other") == "gpt2"
    assert named("model", "gpt2", "other") == "other", "the only one that was named"
    assert named("model", "gpt2", "other", "another") == ""
    monkeypatch.delenv(find_stores.STORES_VARIABLE)
    assert find_stores.source_to_load("sae", str(away), "the store") == str(away), "a program asks"


def test_what_was_moved_with_the_stores_or_stands_beside_a_single_one_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    for name in ("runs/a/sae", "stores/s", "stores/t", "elsewhere"):
        (project / name).mkdir(parents=True)
    for name in ("s", "t"):
        (project / "stores" / name / "features.duckdb").touch()
    (project / "stores" / "loose.duckdb").touch()
    (project / "runs" / "out").symlink_to(tmp_path)
    own = str(project / "runs" / "a" / "sae")
    for start in ("stores", "stores/s", "stores/s/features.duckdb", "stores/loose.duckdb"):
        monkeypatch.setenv(find_stores.STORES_VARIABLE, str(project / start))
        assert find_stores.beside_stores() == project, start
        assert find_stores.source_to_load("sae", own, "the store") == own
        before = "/before/it/was/moved/runs/a/sae"
        assert find_stores.source_to_load("sae", before, "the store") == own
        for other in ("/before/runs/b", "/before/../runs/a", "runs/a", "/before/runs/out", "/"):
            with pytest.raises(ArtefactError, match="start the explorer with --sae"):
                find_stores.source_to_load("sae", other, "the store")
    named = find_stores.environment(str(project / "stores" / "s"), model=(), sae=("other",))
    monkeypatch.setenv(find_stores.NAMED_VARIABLE, named[find_stores.NAMED_VARIABLE])
    assert find_stores.source_to_load("sae", before, "the store") == "other", "it was named"


def test_first_page_needs_no_model_libraries(folder: Path) -> None:
    script = """
import sys
from streamlit.testing.v1 import AppTest
from streamlit.util import calc_hash
app = AppTest.from_file(sys.argv[1], default_timeout=60)
app.run()
assert not app.exception and len(app.get("plotly_chart")) == 3
heavy = {"torch", "transformers", "transformer_lens", "datasets", "activations", "sae.core"}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, APP], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_no_module_of_ours_hides_a_package() -> None:
    # Streamlit puts the application's folder first on the path
    names = {path.stem for path in Path(APP).parent.iterdir()}
    assert not names & {"store", "sae", "activations", "saescope", "dashboards", "tests"}
    assert not names & sys.stdlib_module_names


def test_stores_are_found_by_file_and_folder(folder: Path) -> None:
    tiny = folder / "tiny"
    file = (tiny / "features.duckdb").resolve()
    for path in (folder, tiny, file):
        assert find_stores.find_stores(path) == {"tiny": file}
    copy = folder / "named.duckdb"
    copy.write_bytes(file.read_bytes())
    assert find_stores.find_stores(copy) == {"named": copy.resolve()}
    with pytest.raises(ArtefactError, match="no feature store here"):
        find_stores.find_stores(folder / "gone")


def test_the_server_listens_on_this_machine_only(folder: Path) -> None:
    words = launch.command(launch.ExploreConfig(port=8700))
    assert "--server.address=localhost" in words
    assert "--server.port=8700" in words
    assert "--browser.gatherUsageStats=false" in words
    assert "--server.headless=true" in words
    assert "--server.headless=false" in launch.command(launch.ExploreConfig(open_browser=True))
    with pytest.raises(InputError, match="port"):
        launch.ExploreConfig(port=70_000)
