"""A store of the tiny store's rows under other features' numbers, as if of another SAE."""

from pathlib import Path
from typing import Any

import numpy as np

from store import StoreWriter
from tests.tiny_store import CONTEXT, D_SAE, META, WORDS, make_rows


def make_renumbered_store(
    folder: Path, order: np.ndarray, *, name: str = "other", **meta: Any
) -> Path:
    """Write `folder/name/features.duckdb`: feature f of the tiny store is order[f], twice as
    strong."""
    rows = make_rows()
    path = folder / name / "features.duckdb"
    with StoreWriter(
        path, meta={**META, "name": name, **meta}, d_sae=D_SAE, context=CONTEXT, threads=1
    ) as writer:
        writer.add_vocabulary(WORDS)
        writer.add_sequences(0, rows.tokens, rows.document, rows.keep, rows.split)
        writer.add_activations(rows.position, order[rows.feature], 2 * rows.activation)
        writer.finish()
    return path
