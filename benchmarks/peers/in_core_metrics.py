"""The core metrics of SAELens and of SAEBench, by their own functions; runs in SAEBench's
environment, which has both.

    python in_core_metrics.py SETTINGS.json

The SAE is in SAELens' format, the model a local Hugging Face folder in float32. Activations are
given, so that both see the very same ones; `tokens` are ids, and positions that are not to count
have HIDDEN added, by which both libraries are told to leave them out. The stand-ins below give the
libraries' functions these activations, and take HIDDEN away before the model sees a token.
"""

import importlib.metadata
import json
import sys
import types
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

HIDDEN = 1_000_000


def main(settings: dict) -> None:
    """Both libraries' metrics in the file asked for."""
    from sae_bench.evals.core import main as sae_bench
    from sae_lens import SAE, evals
    from sae_lens.training.activation_scaler import ActivationScaler
    from transformer_lens import HookedTransformer, loading_from_pretrained

    torch.set_num_threads(settings["threads"])
    given = load_file(settings["data"])
    site, batch = settings["site"], settings["batch"]
    sae = SAE.load_from_disk(settings["sae"], device="cpu")
    loading_from_pretrained.OFFICIAL_MODEL_NAMES.append(settings["model"])
    language = HookedTransformer.from_pretrained_no_processing(
        settings["model"], device="cpu", dtype=torch.float32
    )
    tokens = given["tokens"]
    few = tokens[: settings["sequences"]]
    hidden = tokens[tokens >= HIDDEN].unique().tolist()
    stored = Stored(site, tokens, given["activations"])
    model = Shown(language)
    # SAEBench reads what older releases of SAELens had
    older = types.SimpleNamespace(
        cfg=types.SimpleNamespace(
            hook_name=site, hook_head_index=None, hook_layer=0, d_sae=sae.cfg.d_sae
        ),
        encode=sae.encode,
        decode=sae.decode,
        device=torch.device("cpu"),
    )
    rows = {
        "n_batches": -(-len(tokens) // batch),
        "compute_l2_norms": True,
        "compute_sparsity_metrics": True,
        "compute_variance_metrics": True,
        "compute_featurewise_density_statistics": True,
        "eval_batch_size_prompts": batch,
        "model_kwargs": {},
    }
    in_model = {
        "compute_kl": True,
        "compute_ce_loss": True,
        "n_batches": -(-len(few) // batch),
        "eval_batch_size_prompts": batch,
    }
    scaler = ActivationScaler()
    with torch.no_grad():
        found: dict[str, Any] = {
            "sae_lens": {
                **evals.get_sparsity_and_variance_metrics(
                    sae, stored, Batches(tokens), scaler, **rows, ignore_tokens=hidden
                )[0],
                **evals.get_downstream_reconstruction_metrics(
                    sae, model, Batches(few), scaler, **in_model, ignore_tokens=hidden
                ),
            },
            "sae_bench": {
                **sae_bench.get_sparsity_and_variance_metrics(
                    older, stored, Batches(tokens), **rows, ignore_tokens=set(hidden)
                )[0],
                **sae_bench.get_downstream_reconstruction_metrics(
                    older,
                    model,
                    Batches(few),
                    **in_model,
                    ignore_tokens=set(hidden),
                    exclude_special_tokens_from_reconstruction=True,
                ),
            },
        }
    found["versions"] = {
        name: importlib.metadata.version(name) for name in ("sae-lens", "sae-bench")
    }
    Path(settings["results"]).write_text(json.dumps(found), encoding="utf-8")


class Batches:
    """What the libraries read tokens from: the sequences in their order."""

    def __init__(self, tokens: Tensor) -> None:
        self.tokens, self.at = tokens, 0

    def get_batch_tokens(self, batch_size: int) -> Tensor:
        """The next sequences."""
        found = self.tokens[self.at : self.at + batch_size]
        self.at += batch_size
        return found


class Stored:
    """A model that has been run: activations of sequences, found by their tokens."""

    def __init__(self, site: str, tokens: Tensor, activations: Tensor) -> None:
        self.site = site
        self.at = {tuple(row): number for number, row in enumerate(tokens.tolist())}
        self.activations = activations

    def run_with_cache(self, tokens: Tensor, **_: Any) -> tuple[None, dict[str, Tensor]]:
        """The activations of these sequences."""
        rows = [self.at[tuple(row)] for row in tokens.tolist()]
        return None, {self.site: self.activations[rows]}


class Shown:
    """The model, which sees tokens without HIDDEN."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, tokens: Tensor, **options: Any) -> Any:
        return self.model(tokens % HIDDEN, **options)

    def run_with_hooks(self, tokens: Tensor, **options: Any) -> Any:
        """The same with hooks."""
        return self.model.run_with_hooks(tokens % HIDDEN, **options)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
