"""A store of many short documents, some of which are about a topic that some features follow."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from store import StoreWriter

D_SAE, CONTEXT, DOCUMENTS, TOPIC = 80, 32, 90, 30
SHIFTED = tuple(range(10, 20))
"""features that fire four times as often in documents of the topic"""


def make_topic_store(
    folder: Path, *, seed: int = 0, shifted: bool = True, sae_hash: str = "5ae", name: str = "topic"
) -> Path:
    """Write `folder/name/features.duckdb`: one sequence a document, the first TOPIC on rivers.

    Feature f fires at a rate of its own, which differs from document to document.
    """
    rng = np.random.default_rng(seed)
    rate = np.linspace(0.01, 0.2, D_SAE)[None] * rng.gamma(2.0, 0.5, (DOCUMENTS, D_SAE))
    if shifted:
        rate[:TOPIC, SHIFTED] *= 4
    active = rng.random((DOCUMENTS, CONTEXT, D_SAE)) < np.minimum(rate, 0.9)[:, None]
    active[:, 0] = False
    document, index, feature = active.nonzero()
    keep = np.ones((DOCUMENTS, CONTEXT), dtype=bool)
    keep[:, 0] = False
    path = folder / name / "features.duckdb"
    meta = {"name": name, "sae_hash": sae_hash, "model": "tiny", "site": "blocks.0.hook_resid_post"}
    numbers = np.arange(DOCUMENTS, dtype=np.int32)
    with StoreWriter(path, meta=meta, d_sae=D_SAE, context=CONTEXT, threads=1) as writer:
        writer.add_vocabulary([" a", " b"])
        writer.add_sequences(
            0,
            np.ones((DOCUMENTS, CONTEXT), dtype=np.int32),
            np.repeat(numbers[:, None], CONTEXT, axis=1),
            keep,
            (numbers >= 80).astype(np.int8),
        )
        titles = [f"{'River' if n < TOPIC else 'Place'} <{n}>" for n in numbers]
        writer.add_documents(
            pa.table(
                {
                    "document": numbers,
                    "key": [f"source{n % 3}/{n}" for n in numbers],
                    "title": titles,
                    "split": (numbers >= 80).astype(np.int8),
                }
            )
        )
        # the last ten have no topic
        topics = ["Rivers"] * TOPIC + ["Towns"] * (DOCUMENTS - TOPIC - 10)
        writer.add_document_groups("topic", numbers[:-10], topics)
        writer.add_document_groups("source", numbers, [f"source{n % 3}|x" for n in numbers])
        position = document * CONTEXT + index
        writer.add_activations(position, feature, rng.uniform(0.5, 4, len(feature)))
        writer.finish()
    return path
