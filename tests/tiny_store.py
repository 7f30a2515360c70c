"""A small synthetic feature store with numbers that can be checked by hand or against numpy."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from store import StoreWriter

D_SAE = 64
CONTEXT = 16
N_SEQUENCES = 40
N_DOCUMENTS = 25
DEAD = (7, 40, 63)
EVERYWHERE = 3
RARE = 11
WORDS = (
    "<|endoftext|>", "<|bos|>", " the", " river", " Paris", " of", " a", " light", "\n", "\t",
    " <b>bold</b>", " $x$", " *star*", "&amp;", " \u202edrawkcab", " 雨", b"\xe9\x9b", b"\xa8",
    " Tuesday", " seven", ".", ",", " mountain", " harbour", " copper", " violin", " winter",
)  # fmt: skip
META = {
    "name": "tiny",
    "model": "tiny-llama",
    "site": "blocks.1.hook_resid_post",
    "architecture": "topk",
    "sae_config": {"kind": "topk", "k": 4, "d_in": 32, "d_sae": D_SAE},
    "metrics": {"l0": 4.25, "fvu": 0.1875, "delta_ce": 0.0625, "dead_fraction": 3 / 64},
    "harvest": "0" * 64,
    "sae_path": "runs/tiny",
    "sae_hash": "5ae",
    "created": "2025-01-02T03:04:05+00:00",
    "protocol": "abc123",
}


@dataclass(frozen=True)
class Rows:
    """What goes into the tiny store, for comparison with what comes out."""

    tokens: np.ndarray
    document: np.ndarray
    keep: np.ndarray
    split: np.ndarray
    position: np.ndarray
    feature: np.ndarray
    activation: np.ndarray


def make_rows(seed: int = 0) -> Rows:
    """Random rows: ties (activations are eighths), dead features, one active at every position.

    Feature RARE is active once, at sequence 2, place 5, with activation 1.5.
    """
    rng = np.random.default_rng(seed)
    shape = (N_SEQUENCES, CONTEXT)
    tokens = rng.integers(2, len(WORDS), shape).astype(np.int32)
    tokens[:, 0] = 1
    tokens[3, 4:6] = (WORDS.index(b"\xe9\x9b"), WORDS.index(b"\xa8"))
    document = (np.arange(N_SEQUENCES * CONTEXT) * N_DOCUMENTS // (N_SEQUENCES * CONTEXT)).reshape(
        shape
    )
    tokens[:, -1] = 0
    keep = tokens > 1
    split = (np.arange(N_SEQUENCES) >= 36).astype(np.int8)
    chance = 1.5 / (np.arange(D_SAE) + 4.0)
    chance[list(DEAD)] = 0
    chance[RARE] = 0
    chance[EVERYWHERE] = 1
    active = (rng.random((*shape, D_SAE)) < chance) & keep[..., None]
    active[2, 5, RARE] = True
    sequence, place, feature = active.nonzero()
    activation = rng.integers(1, 80, len(feature)).astype(np.float32) / 8
    activation[feature == RARE] = 1.5
    order = rng.permutation(len(feature))
    position = (sequence * CONTEXT + place)[order]
    return Rows(
        tokens, document.astype(np.int32), keep, split, position, feature[order], activation[order]
    )


def make_tiny_store(folder: Path, seed: int = 0) -> Path:
    """Write the tiny store as `folder/tiny/features.duckdb`; the path of the file."""
    rows = make_rows(seed)
    path = folder / "tiny" / "features.duckdb"
    with StoreWriter(
        path, meta=META, d_sae=D_SAE, context=CONTEXT, threads=1, replace=True
    ) as writer:
        writer.add_vocabulary(WORDS)
        half = N_SEQUENCES // 2
        for part in (slice(half, None), slice(0, half)):
            writer.add_sequences(
                part.start, rows.tokens[part], rows.document[part], rows.keep[part],
                rows.split[part],
            )  # fmt: skip
        numbers = np.arange(N_DOCUMENTS, dtype=np.int32)
        writer.add_documents(
            pa.table(
                {
                    "document": numbers,
                    "key": [f"doc-{n}" for n in numbers],
                    "title": [f"Title <{n}>" for n in numbers],
                    "split": ["held_out" if n == N_DOCUMENTS - 1 else "train" for n in numbers],
                }
            )
        )
        for part in np.array_split(np.arange(len(rows.position)), 5):
            writer.add_activations(rows.position[part], rows.feature[part], rows.activation[part])
        writer.add_features(
            {
                "decoder_norm": np.ones(D_SAE, dtype=np.float32),
                "encoder_bias": np.linspace(-1, 1, D_SAE, dtype=np.float32),
            }
        )
        _add_what_weights_say(writer)
        writer.finish()
    return path


def _add_what_weights_say(writer: StoreWriter) -> None:
    """Feature f raises token (f + r) % V by 2 - r/10, lowers token (f + 9 + r) % V by as much.

    Its neighbours are f + 1, f + 2, f + 3 (mod 64), cosines 0.75, 0.5, 0.25. On the map it lies in
    column f % 8 and row f // 8, the first row on top.
    """
    features, ranks = np.repeat(np.arange(D_SAE), 5), np.tile(np.arange(5), D_SAE)
    for sign, shift in ((1, 0), (-1, 9)):
        writer.add_logits(
            features, np.full(len(features), sign), ranks,
            (features + shift + ranks) % len(WORDS), sign * (2 - ranks / 10),
        )  # fmt: skip
    features, ranks = np.repeat(np.arange(D_SAE), 3), np.tile(np.arange(3), D_SAE)
    writer.add_neighbours(features, ranks, (features + 1 + ranks) % D_SAE, 0.75 - ranks / 4)
    writer.add_map(np.arange(D_SAE) % 8, -(np.arange(D_SAE) // 8))
