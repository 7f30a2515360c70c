"""Which library multiplies: measured once, and remembered."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sae.kernels import matmul
from tests.kernels.cases import Random


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("saescope.cache.cache_dir", lambda: tmp_path)
    remembered = matmul._remembered  # a test may put another in its place
    remembered.cache_clear()
    yield
    remembered.cache_clear()


def test_both_are_products(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W = Random(0).integers(5, 9), Random(1).integers(7, 9)
    for name in ("default", "onednn") if matmul._has_onednn() else ("default",):
        monkeypatch.setattr(matmul, "_remembered", lambda _, name=name: name)
        found = matmul.rows_by_features(x, W, torch.empty(6, 7))
        assert torch.equal(found, x @ W.T)


def test_the_choice_is_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_has_onednn", lambda: True)
    measured = iter(["onednn"])
    monkeypatch.setattr(matmul, "_measured", lambda: next(measured))
    assert matmul.faster() == "onednn"
    matmul._remembered.cache_clear()  # another process
    assert matmul.faster() == "onednn"


def test_a_damaged_note_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_has_onednn", lambda: True)
    monkeypatch.setattr(matmul, "_measured", lambda: "default")
    matmul.faster()
    (note,) = tmp_path.iterdir()
    note.write_bytes(b"\xff\x00")
    matmul._remembered.cache_clear()
    assert matmul.faster() == "default"
    assert note.read_text() == "default\n"


def test_deterministic_mode_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matmul, "_has_onednn", lambda: True)
    monkeypatch.setattr(matmul, "_measured", lambda: "onednn")
    torch.use_deterministic_algorithms(True)
    try:
        assert matmul.faster() == "default"
    finally:
        torch.use_deterministic_algorithms(False)


def test_measuring_ends_in_a_name() -> None:
    if matmul._has_onednn():
        assert matmul._measured() in ("default", "onednn")
