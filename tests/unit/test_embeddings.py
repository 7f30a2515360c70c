"""Embeddings that papers share: in order, once, of texts that are the same in all papers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from sae.reproduction import embeddings
from sae.reproduction.embeddings import lead_texts, leads, topics, words


class Counting:
    """Stands for the model: a text's row says how long it is."""

    embedded = 0

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        type(self).embedded += len(texts)
        return np.array([[len(each), 1.0] for each in texts], np.float32)


@pytest.fixture(autouse=True)
def _model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "Sentences", Counting)
    monkeypatch.setattr(Counting, "embedded", 0)


def test_leads_are_embedded_once_in_order(tmp_path: Path) -> None:
    found = leads(tmp_path / "csr", 150)
    texts = lead_texts(150)
    assert [int(each) for each in found.x[:, 0]] == [len(each) for each in texts]
    assert max(map(len, texts)) == 60
    assert found.queries is not None
    assert len(set(found.queries[:, 0])) > 20
    assert len(found.y) == 150
    assert len(set(found.y)) == len(topics()) == 11
    assert Counting.embedded == 300
    again = leads(tmp_path / "msae", 150)
    assert Counting.embedded == 300, "another paper reads what is there"
    assert np.array_equal(again.x, found.x)


def test_words_are_the_most_frequent(tmp_path: Path) -> None:
    chosen, rows = words(tmp_path / "msae", 40)
    assert {"with", "from", "which"} <= set(chosen)
    assert all(len(each) > 3 for each in chosen)
    assert [int(each) for each in rows[:, 0]] == [len(each) for each in chosen]
