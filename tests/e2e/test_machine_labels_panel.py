"""The panel of machines' labels on the feature page."""

from pathlib import Path

from dashboards.panels.machine_labels import label_html
from store import Annotations
from store.machine_labels import MachineLabel
from tests.e2e.test_explorer import FEATURE, folder, made, open_page, shown
from tests.tiny_store import RARE

__all__ = ["folder", "made"]  # fixtures


def made_by(method: str, label: str, score: float | None) -> MachineLabel:
    details = {"auc": 0.875, "shuffled": 0.515, "top_token": 0.625, "fit": score}
    return MachineLabel(feature=RARE, method=method, label=label, score=score, details=details)


def test_scores_and_baselines_stand_beside_labels(folder: Path) -> None:
    with Annotations.open(folder / "tiny", sae_hash="5ae") as notes:
        notes.set_label(RARE, "a person's")
        notes.set_machine_labels(
            [made_by("token", "on <b>“x”</b>", 0.75), made_by("topic", "t", None)]
        )
    app = open_page(FEATURE, sae="tiny", feature=str(RARE))
    assert not app.exception
    text = shown(app)
    assert "on &lt;b&gt;“x”&lt;/b&gt;" in text
    assert "0.75" in text
    assert "AUC 0.88" in text
    assert "shuffled 0.52 · top token 0.62" in text
    assert "not scored" in text
    assert "a person" in app.markdown[0].value, "a person's label is the feature's"
    assert any("Machine labels" in each.value for each in app.markdown)


def test_a_feature_that_nobody_labelled_is_called_what_the_machine_says(folder: Path) -> None:
    with Annotations.open(folder / "tiny", sae_hash="5ae") as notes:
        notes.set_label(RARE, "")
        notes.set_machine_labels([made_by("token", "on <b>“x”</b>", 0.75)])
    app = open_page(FEATURE, sae="tiny", feature=str(RARE))
    assert app.markdown[0].value.startswith(f"## Feature {RARE} · :gray["), "tokens, no label"
    assert "machine label, score 0.75" in app.caption[0].value
    assert "<b>" not in app.caption[0].value


def test_without_labels_it_says_how_to_make_them(folder: Path) -> None:
    app = open_page(FEATURE, sae="tiny", feature=str(RARE + 1))
    assert any("saescope label" in each.value for each in app.caption)


def test_odd_details_are_left_out() -> None:
    odd = MachineLabel(
        feature=1, method="x", label="l", score=0.5, details={"auc": "<b>", "shuffled": None}
    )
    drawn = label_html(odd)
    assert "<b>0.50</b>" in drawn
    assert "AUC" not in drawn
