"""A small store with topics, layers, heads and a histogram of effects, all countable by hand."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from store import StoreWriter

D_SAE, CONTEXT, DOCUMENTS = 4, 4, 11
ARTS, SCIENCE = range(5), range(5, 10)  # document 10 has no topic
SITES = ("blocks.0.hook_resid_post", "blocks.1.hook_resid_post")


def make_writer(path: Path) -> StoreWriter:
    return StoreWriter(path, meta={}, d_sae=D_SAE, context=CONTEXT, threads=1)


def fill(writer: StoreWriter) -> None:
    """Eleven documents of a sequence each. Feature 0 fires in all of Arts, at all three positions
    of document 0; 1 everywhere; 2 in documents 4 and 10; 3 never."""
    writer.add_vocabulary(["a", "b"])
    shape = (DOCUMENTS, CONTEXT)
    document = np.repeat(np.arange(DOCUMENTS)[:, None], CONTEXT, axis=1)
    keep = np.ones(shape, dtype=bool)
    keep[:, 0] = False
    writer.add_sequences(0, np.zeros(shape, int), document, keep, np.zeros(DOCUMENTS, int))
    numbers = np.arange(DOCUMENTS)
    names = [str(n) for n in numbers]
    columns = {"document": numbers, "key": names, "title": names, "split": [0] * DOCUMENTS}
    writer.add_documents(pa.table(columns))
    fires = [(0, n, 1) for n in ARTS] + [(0, 0, 2), (0, 0, 3)]
    fires += [(1, n, 2) for n in numbers] + [(2, 4, 1), (2, 10, 1)]
    feature, in_document, index = (np.array(each) for each in zip(*fires, strict=True))
    writer.add_activations(in_document * CONTEXT + index, feature, np.ones(len(fires)))


def make_facts_store(folder: Path) -> Path:
    """Write `folder/facts/features.duckdb`; the path of the file."""
    path = folder / "facts" / "features.duckdb"
    with make_writer(path) as writer:
        fill(writer)
        topics = ["Arts"] * len(ARTS) + ["Science"] * len(SCIENCE)
        writer.add_document_groups("topic", np.arange(10), topics)
        writer.add_document_groups("source", np.arange(11), ["one.jsonl"] * 11)
        counts = np.zeros((1, 40), int)
        counts[0, [0, 39]] = (3, 1)
        writer.add_logit_histograms([1], [-0.5], [1.5], counts)
        writer.add_layers(SITES, 100, [0.75, None])
        amount = [[3.0, 0, 0.5, 0], [1.0, 2, 0.5, 0]]
        writer.add_layer_profiles(amount, [[6, 0, 1, 0], [2, 5, 1, 0]])
        columns = {
            "layer_mean": pa.array([0.25, 1.0, 0.5, None], pa.float32()),
            "layer_std": pa.array([0.433, 0.0, 0.5, None], pa.float32()),
            "layer_peak": pa.array([0, 1, 0, None], pa.int16()),
        }
        writer.add_features(pa.table(columns))
        norms = np.zeros((D_SAE, 2))
        norms[0] = (3, 1)
        writer.add_head_norms(norms)
        writer.finish()
    return path
