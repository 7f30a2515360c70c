"""Batches from SAELens' cached activations, timed; runs in that library's own environment.

    python in_saelens_loader.py SETTINGS.json

Its `ActivationsStore` over a data set laid out as its `CacheActivationsRunner` does, with the
settings that its configuration has by default. The data set is made where it is not there yet.
"""

import importlib.metadata
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Array2D, Dataset, Features, Sequence, Value, concatenate_datasets
from sae_lens.training.activations_store import ActivationsStore

SITE = "site"
SHARD_SEQUENCES = 128


def make(folder: Path, settings: dict) -> None:
    """Write the rows [row, d_in] of a file of float16 as a data set of sequences."""
    rows = np.load(settings["rows"], mmap_mode="r")
    context, d_in = settings["context"], rows.shape[1]
    acts = rows[: len(rows) // context * context].reshape(-1, context, d_in)
    features = Features({
        SITE: Array2D(shape=(context, d_in), dtype=settings["dtype"]),
        "token_ids": Sequence(Value(dtype="int32"), length=context),
    })  # fmt: skip
    shards = []
    for start in range(0, len(acts), SHARD_SEQUENCES):
        part = np.array(acts[start : start + SHARD_SEQUENCES]).astype(settings["dtype"])
        ids = np.zeros(part.shape[:2], np.int32)
        shards.append(Dataset.from_dict({SITE: part, "token_ids": ids}, features=features))
    unfinished = folder.with_suffix(".partial")
    concatenate_datasets(shards).save_to_disk(str(unfinished))
    unfinished.rename(folder)


def batches(folder: Path, settings: dict) -> itertools.islice:
    """One pass, as the trainer gets them: float32, special tokens left out (there are none)."""
    tokens = settings["tokens"]
    store = ActivationsStore(
        model=torch.nn.Identity(),  # type: ignore[arg-type]
        dataset=None,
        streaming=False,
        hook_name=SITE,
        hook_head_index=None,
        context_size=settings["context"],
        d_in=settings["d_in"],
        n_batches_in_buffer=settings["n_batches_in_buffer"],
        total_training_tokens=tokens,
        store_batch_size_prompts=settings["store_batch_size_prompts"],
        train_batch_size_tokens=settings["batch"],
        prepend_bos=False,
        normalize_activations="none",
        device=torch.device("cpu"),
        dtype="float32",
        cached_activations_path=str(folder),
        exclude_special_tokens=torch.tensor([1]),
    )
    return itertools.islice(store, tokens // settings["batch"])


def main(settings: dict) -> None:
    """Time some passes after one that is not timed; the times in the file asked for."""
    torch.set_num_threads(settings["threads"])
    folder = Path(settings["folder"])
    if not folder.exists():
        make(folder, settings)
    seconds = []
    for _ in range(1 + settings["passes"]):
        made = batches(folder, settings)
        start, count = time.perf_counter(), 0
        for x in made:
            assert x.dtype == torch.float32
            count += len(x)
        seconds.append((time.perf_counter() - start) / count)
    found = {
        "version": importlib.metadata.version("sae-lens"),
        "torch": torch.__version__,
        "tokens_per_s": [1 / each for each in seconds[1:]],
    }
    Path(settings["results"]).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
