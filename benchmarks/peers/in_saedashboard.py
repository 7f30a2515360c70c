"""SAEDashboard's runner on given rows, timed; runs in that library's environment.

    python in_saedashboard.py SETTINGS.json

The SAE is in SAELens' format, the model a local Hugging Face folder, tokens [sequence, position]
and rows [sequence, position, d_in] are NumPy files. The library finds the rows
as its own cached activations, so that no forward pass is in the time. Timed: loading the model and
the SAE (not the packages), `SaeVisRunner.run` with all features in one batch, and one HTML file a
feature. What it found of each feature goes into the results.
"""

import importlib.metadata
import json
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from sae_dashboard.data_writing_fns import save_feature_centric_vis
from sae_dashboard.sae_vis_data import SaeVisConfig
from sae_dashboard.sae_vis_runner import SaeVisRunner
from sae_lens import SAE, HookedSAETransformer
from transformer_lens import loading_from_pretrained
from transformers import PreTrainedTokenizerFast

MINIBATCH = 64


def main(settings: dict) -> None:
    """Time the library on the features asked for; what it found in the file asked for."""
    torch.set_num_threads(settings["threads"])
    start, used = time.perf_counter(), time.process_time()
    # a folder is read as a model of the hub is, but must be known by its name
    loading_from_pretrained.OFFICIAL_MODEL_NAMES.append(settings["model"])
    # the library holds an old release of transformers, which does not know the tokenizer's class
    of_model = Path(settings["model"])
    special = json.loads((of_model / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(of_model / "tokenizer.json"),
        name_or_path=settings["model"],
        add_bos_token=True,  # without it the tokenizer is loaded again by its class
        **{name: special[name] for name in ("bos_token", "eos_token", "pad_token")},
    )
    model = HookedSAETransformer.from_pretrained_no_processing(
        settings["model"], device="cpu", tokenizer=tokenizer
    )
    sae = SAE.load_from_disk(settings["sae"], device="cpu")
    loaded, loaded_cpu = time.perf_counter() - start, time.process_time() - used
    # refused for TopK SAEs that choose without regard to decoder norms; here all norms are equal
    sae.fold_W_dec_norm = lambda: None
    tokens = torch.from_numpy(np.load(settings["tokens"])).long()
    folder = Path(settings["folder"])
    shutil.rmtree(folder, ignore_errors=True)
    cache = folder / "cache"
    cache.mkdir(parents=True)
    rows = np.load(settings["rows"], mmap_mode="r")
    for number, first in enumerate(range(0, len(tokens), MINIBATCH)):
        part = torch.from_numpy(np.array(rows[first : first + MINIBATCH]))
        torch.save({settings["site"]: part}, cache / f"model_activations_{number}.pt")
    features = settings["features"]
    config = SaeVisConfig(
        hook_point=settings["site"],
        features=features,
        minibatch_size_features=len(features),
        minibatch_size_tokens=MINIBATCH,
        ignore_tokens=set(settings["ignore_tokens"]),
        ignore_positions=settings["ignore_positions"],
        cache_dir=cache,
    )
    start, used = time.perf_counter(), time.process_time()
    data = SaeVisRunner(config).run(encoder=sae, model=model, tokens=tokens)
    ran, ran_cpu = time.perf_counter() - start, time.process_time() - used
    start, used = time.perf_counter(), time.process_time()
    pages = folder / "pages"
    pages.mkdir()
    save_feature_centric_vis(data, pages / "page.html", separate_files=True)
    wrote, wrote_cpu = time.perf_counter() - start, time.process_time() - used
    found = {
        "version": importlib.metadata.version("sae-dashboard"),
        "torch": torch.__version__,
        "load_seconds": loaded,
        "load_processor_seconds": loaded_cpu,
        "seconds": ran,
        "processor_seconds": ran_cpu,
        "html_seconds": wrote,
        "html_processor_seconds": wrote_cpu,
        "html_bytes": sum(page.stat().st_size for page in pages.iterdir()),
        "features": {str(feature): described(data, feature) for feature in features},
    }
    shutil.rmtree(folder)
    Path(settings["results"]).write_text(json.dumps(found), encoding="utf-8")


def described(data, feature: int) -> dict:
    """A feature's histogram, density, logits and example positions, as the library has them."""
    one = data.feature_data_dict[feature]
    groups = one.sequence_data.seq_group_data
    density = re.search(r"DENSITY = ([0-9.]+)%", one.acts_histogram_data.title or "")
    return {
        "histogram": one.acts_histogram_data.bar_heights,
        "bars": one.acts_histogram_data.bar_values,
        "density": float(density[1]) / 100 if density else 0.0,
        "logits_top": one.logits_table_data.top_token_ids,
        "logits_top_values": one.logits_table_data.top_logits,
        "groups": [
            {
                "title": group.title,
                "at": [
                    [each.original_index, each.qualifying_token_index] for each in group.seq_data
                ],
                "activations": [each.feat_acts for each in group.seq_data],
            }
            for group in groups
        ],
    }


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
