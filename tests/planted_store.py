"""A store whose features stand for known things, so that their right labels are known."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from store import StoreWriter

CONTEXT, SEQUENCES, PER_DOCUMENT = 32, 480, 4
WORDS = ["<bos>", " river", " winter", *(f" word{n}" for n in range(61))]
RIVER, WINTER = 1, 2
TOKEN, BIGRAM, TOPIC, BEFORE, FIRST_RANDOM = 0, 1, 2, 3, 4
"""features: on " river"; at the end of " winter river"; in documents on sports; before " winter",
which its decoder raises; and from FIRST_RANDOM on at random"""
D_SAE = 16


def make_planted_store(folder: Path, seed: int = 0) -> Path:
    """Write the store as `folder/planted/features.duckdb`; the path of the file.

    Every second document is titled "Sports report N", the others "Weather note N".
    """
    random = np.random.default_rng(seed)
    tokens = random.integers(1, len(WORDS), (SEQUENCES, CONTEXT)).astype(np.int32)
    # the pair is common enough to be learned, and each of its halves occurs without the other too
    at = random.random((SEQUENCES, CONTEXT - 1)) < 0.02
    tokens[:, :-1][at] = WINTER
    tokens[:, 1:][at] = RIVER
    tokens[:, 0] = 0
    keep = tokens > 0
    document = np.repeat(np.arange(SEQUENCES // PER_DOCUMENT), PER_DOCUMENT)
    sports = document % 2 == 0
    active = np.zeros((SEQUENCES, CONTEXT, D_SAE), dtype=bool)
    active[..., TOKEN] = tokens == RIVER
    active[:, 1:, BIGRAM] = (tokens[:, 1:] == RIVER) & (tokens[:, :-1] == WINTER)
    for half in (0, CONTEXT // 2):  # once in each window of 16
        place = random.integers(half + 1, half + CONTEXT // 2, SEQUENCES)
        active[np.arange(SEQUENCES)[sports], place[sports], TOPIC] = True
    # but not just before the end of a window of 16, where one cannot see it
    active[:, :-1, BEFORE] = (tokens[:, 1:] == WINTER) & keep[:, :-1]
    active[:, CONTEXT // 2 - 1, BEFORE] = False
    active[..., FIRST_RANDOM:] = random.random((SEQUENCES, CONTEXT, D_SAE - FIRST_RANDOM)) < 0.03
    sequence, index, feature = (active & keep[..., None]).nonzero()
    path = folder / "planted" / "features.duckdb"
    meta = {
        "name": "planted",
        "model": "none",
        "site": "blocks.3.hook_resid_post",
        "sae_hash": "5ae",
    }
    with StoreWriter(path, meta=meta, d_sae=D_SAE, context=CONTEXT, threads=1) as writer:
        writer.add_vocabulary(WORDS)
        documents = np.broadcast_to(document[:, None], tokens.shape).astype(np.int32)
        writer.add_sequences(0, tokens, documents, keep, np.zeros(SEQUENCES, np.int8))
        numbers = np.arange(SEQUENCES // PER_DOCUMENT)
        titles = [f"{'Weather note' if n % 2 else 'Sports report'} {n}" for n in numbers]
        keys = [str(n) for n in numbers]
        table = {"document": numbers, "key": keys, "title": titles, "split": ["train"] * len(keys)}
        writer.add_documents(pa.table(table))
        value = random.uniform(0.5, 2.0, len(feature)).astype(np.float32)
        writer.add_activations(sequence * CONTEXT + index, feature, value)
        raised = np.full(D_SAE, WINTER)
        ones = np.ones(D_SAE, np.int64)
        writer.add_logits(np.arange(D_SAE), ones, 0 * raised, raised, ones * 1.0)
        writer.finish()
    return path
