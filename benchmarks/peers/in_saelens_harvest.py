"""SAELens' cached-activations runner over given tokens, timed; runs in that library's environment.

    python in_saelens_harvest.py SETTINGS.json

The model is a local Hugging Face folder, the tokens a file [sequence, position]. What is timed is
`CacheActivationsRunner.run`: the model up to the site's block, and a data set on disk. That is in
float32 whatever the model computes in, as its data sets cannot have bfloat16.
"""

import importlib.metadata
import json
import resource
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from sae_lens import CacheActivationsRunner, CacheActivationsRunnerConfig
from transformer_lens import loading_from_pretrained


def main(settings: dict) -> None:
    """Time one run after a short one that is not timed; what was found in the file asked for."""
    torch.set_num_threads(settings["threads"])
    # a folder is read as a model of the hub is, but must be known by its name
    loading_from_pretrained.OFFICIAL_MODEL_NAMES.append(settings["model"])
    tokens = np.load(settings["tokens"])
    batch, context = settings["batch"], tokens.shape[1]
    dataset = Dataset.from_dict({"input_ids": tokens.tolist()})
    folder = Path(settings["folder"])
    for count in (batch, len(tokens)):
        shutil.rmtree(folder, ignore_errors=True)
        config = CacheActivationsRunnerConfig(
            dataset_path="",
            model_name=settings["model"],
            model_from_pretrained_kwargs={"dtype": settings["dtype"]},
            model_batch_size=batch,
            hook_name=settings["site"],
            d_in=settings["d_in"],
            training_tokens=count * context,
            context_size=context,
            new_cached_activations_path=str(folder),
            device="cpu",
            # as large as the data, or what it has by default: part of a buffer would be run twice
            buffer_size_gb=min(2.0, (count * context + 0.5) * settings["d_in"] * 4 / 1e9),
            prepend_bos=False,
            shuffle=False,  # of the whole data set; its sequences are then those of the file
        )
        runner = CacheActivationsRunner(config, override_dataset=dataset)
        start, used = time.perf_counter(), _processor_seconds()
        made = runner.run()
        seconds, used = time.perf_counter() - start, _processor_seconds() - used
    first = torch.tensor(made.with_format("numpy")[0][settings["site"]])
    found = {
        "version": importlib.metadata.version("sae-lens"),
        "torch": torch.__version__,
        "tokens": len(made) * context,
        "seconds": seconds,
        "processor_seconds": used,
        "first_norms": first.float().norm(dim=1)[:8].tolist(),
    }
    shutil.rmtree(folder, ignore_errors=True)
    Path(settings["results"]).write_text(json.dumps(found), encoding="utf-8")


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
