"""The feature that `saescope steer` tries first, from stores whose features are set by hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sae.commands.steer import suggest
from saescope.errors import InputError
from store import StoreWriter

WORDS = ("<bos>", " of", " Europe", "Europe", " Paris", " William", " river", "ophy", " 1912")
N_SEQUENCES, CONTEXT = 200, 11


def make_store(folder: Path, features: dict[int, tuple[list[str], int, float]]) -> str:
    """A store of 2000 kept positions; a feature is the words it fires on, how often, how much."""
    tokens = np.ones((N_SEQUENCES, CONTEXT), np.int32)
    tokens[:, 0] = 0
    position, feature, activation = [], [], []
    for number, (words, times, largest) in features.items():
        for time in range(times):
            at = time * CONTEXT + 1 + number  # one a sequence
            tokens.ravel()[at] = WORDS.index(words[time % len(words)])
            position.append(at)
            feature.append(number)
            activation.append(largest - time / 1000)
    path = folder / "features.duckdb"
    with StoreWriter(path, meta={}, d_sae=8, context=CONTEXT, threads=1) as writer:
        writer.add_vocabulary(WORDS)
        zeros = np.zeros(N_SEQUENCES, np.int8)
        writer.add_sequences(0, tokens, np.zeros_like(tokens), tokens > 0, zeros)
        facts = {"key": ["a"], "title": ["A"], "split": ["train"]}
        writer.add_documents(pa.table({"document": np.zeros(1, np.int32), **facts}))
        writer.add_activations(
            np.array(position), np.array(feature, np.int32), np.array(activation, np.float32)
        )
        writer.add_features({"decoder_norm": np.ones(8, np.float32)})
        writer.finish()
    return str(path)


def test_a_name_in_whatever_spelling_comes_first(tmp_path: Path) -> None:
    """Before what fires more strongly on a short name, on several words, on none, or rarely."""
    path = make_store(
        tmp_path,
        {
            0: ([" Paris"], 10, 90.0),
            1: ([" Europe", " William"], 10, 80.0),
            2: (["ophy"], 10, 70.0),
            3: ([" William"], 3, 60.0),
            4: ([" Europe", "Europe"], 10, 50.0),
            5: ([" William"], 10, 40.0),
        },
    )
    assert suggest(path) == (4, 50.0, "Europe")


def test_then_a_rarer_name(tmp_path: Path) -> None:
    path = make_store(tmp_path, {0: ([" river"], 10, 90.0), 1: ([" William"], 3, 60.0)})
    assert suggest(path) == (1, 60.0, "William")


def test_then_any_one_word(tmp_path: Path) -> None:
    path = make_store(
        tmp_path,
        {
            0: ([" of"], 10, 90.0),
            1: ([" 1912"], 10, 80.0),
            2: ([" river"], 10, 70.0),
            3: ([" river", " Paris"], 10, 75.0),
        },
    )
    assert suggest(path) == (2, 70.0, "river")


def test_else_it_is_said(tmp_path: Path) -> None:
    path = make_store(tmp_path, {0: ([" of"], 10, 9.0), 1: ([" river", " Paris"], 10, 8.0)})
    with pytest.raises(InputError, match="no feature to suggest"):
        suggest(path)
