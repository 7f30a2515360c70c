"""Which library multiplies: measured once, and remembered."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sae.kernels import products
from tests.kernels.cases import Random


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("sae.kernels.products.cache_dir", lambda: tmp_path)
    remembered = products._remembered  # a test may put another in its place
    remembered.cache_clear()
    yield
    remembered.cache_clear()


def test_both_are_products(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W = Random(0).integers(5, 9), Random(1).integers(7, 9)
    for name in ("default", "onednn") if products._has_onednn() else ("default",):
        monkeypatch.setattr(products, "_remembered", lambda _, name=name: name)
        found = products.rows_by_features(x, W, torch.empty(6, 7))
        assert torch.equal(found, x @ W.T)


def test_the_choice_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_onednn", lambda: True)
    measured = iter(["onednn"])
    monkeypatch.setattr(products, "_measured", lambda: next(measured))
    assert products.faster() == "onednn"
    products._remembered.cache_clear()  # another process
    assert products.faster() == "onednn"


def test_a_damaged_note_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_onednn", lambda: True)
    monkeypatch.setattr(products, "_measured", lambda: "default")
    products.faster()
    (note,) = tmp_path.iterdir()
    note.write_bytes(b"\xff\x00")
    products._remembered.cache_clear()
    assert products.faster() == "default"
    assert note.read_text() == "default\n"


def test_deterministic_mode_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_has_onednn", lambda: True)
    monkeypatch.setattr(products, "_measured", lambda: "onednn")
    torch.use_deterministic_algorithms(True)
    try:
        assert products.faster() == "default"
    finally:
        torch.use_deterministic_algorithms(False)


def test_measuring_ends_in_a_name() -> None:
    if products._has_onednn():
        assert products._measured() in ("default", "onednn")
