"""`saescope eval`: an SAE on held-out text, under a protocol that is written down and hashed."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from activations import ActivationStore
from sae.base import SparseAutoencoder
from sae.evaluation.downstream import measure_downstream
from sae.evaluation.reconstruction import measure_reconstruction
from sae.harvests import choose_site, held_out_rows, load_harvested_model, open_harvest
from sae.loading import load
from saescope.artefact import sha256_json, write_json
from saescope.config import Config
from saescope.errors import check_range
from saescope.progress import say

EVALUATION_FILE = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Config):
    """Measure an SAE on the held-out part of a harvest."""

    run: str
    """Folder of a trained run or of an SAE."""
    harvest: str | None = None
    """Folder of the harvest to measure on; the one it was trained on if not given."""
    rows: int | None = None
    """Held-out activation rows for L0, FVU and the like; all of them if not given."""
    tokens: int = 8192
    """Held-out tokens that the model is run on for delta CE and KL; 0 leaves these out."""
    batch: int = 4
    """Sequences a run of the model."""
    out: str | None = None
    """File to write; evaluation.json in the run's folder if not given."""

    def __post_init__(self) -> None:
        if self.rows is not None:
            check_range("rows", self.rows, low=1)
        check_range("tokens", self.tokens, low=0)
        check_range("batch", self.batch, low=1)


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Measure, print and write the core metrics; the written dictionary.

    Raises InputError if the harvest does not fit the SAE, ArtefactError if either cannot be read.
    """
    sae = load(config.run)
    harvest = open_harvest(sae, config.harvest)
    site = choose_site(harvest, sae.metadata.get("site"))
    measured = measure_reconstruction(sae, held_out_rows(harvest, site, config.rows))
    reconstruction = {k: v for k, v in vars(measured).items() if k != "density"}
    protocol: dict[str, Any] = {
        "version": 1,
        "harvest": harvest.hash,
        "site": site,
        "split": "held_out",
        "positions": "all but position 0 and special tokens",
        "mean": "of the rows evaluated (FVU); of the training rows (mean-ablation)",
        "rows": measured.rows,
    }
    downstream: dict[str, Any] | None = None
    if config.tokens:
        downstream, facts = _downstream(sae, harvest, site, config)
        protocol.update(facts)
    result = {
        "protocol": protocol,
        "protocol_hash": sha256_json(protocol),
        "reconstruction": reconstruction,
        "downstream": downstream,
    }
    write_json(config.out or Path(config.run) / EVALUATION_FILE, result)
    for line in report(result):
        say(line)
    return result


def _downstream(
    sae: SparseAutoencoder, harvest: ActivationStore, site: str, config: EvaluateConfig
) -> tuple[dict[str, Any], dict[str, Any]]:
    model = load_harvested_model(harvest, harvest.manifest["model"]["dtype"])
    held_out = torch.from_numpy(harvest.split == 1).nonzero()[:, 0]
    chosen = held_out[: max(1, config.tokens // harvest.context)].numpy()
    tokens = torch.from_numpy(harvest.tokens[chosen]).long()
    keep = torch.from_numpy(harvest.keep[chosen])
    measured = measure_downstream(
        model,
        site,
        lambda x: sae(x).x_hat,
        torch.from_numpy(harvest.statistics(site).mean),
        tokens,
        keep,
        batch=config.batch,
    )
    described = {
        "model": model.weights_hash,
        "dtype": str(model.dtype).removeprefix("torch."),
        "sequences": len(chosen),
        "context": harvest.context,
    }
    return asdict(measured), described


def report(result: dict[str, Any]) -> list[str]:
    """The metrics as lines for people."""
    r, d = result["reconstruction"], result["downstream"]
    lines = [
        f"on {r['rows']:,} held-out activations (protocol {result['protocol_hash'][:12]}):",
        f"  L0             {r['l0']:.2f}",
        f"  FVU            {r['fvu']:.4f} ± {r['fvu_interval']:.4f}",
        f"  cosine         {r['cosine']:.4f}",
        f"  norm ratio     {r['norm_ratio']:.4f}",
        f"  never fired    {100 * r['dead_fraction']:.1f}% of features",
    ]
    if d is None:
        return lines
    lines += [
        f"on {d['tokens']:,} held-out tokens, in nats:",
        f"  CE             {d['ce_clean']:.4f} clean, {d['ce']:.4f} with the SAE, "
        f"{d['ce_mean']:.4f} mean-ablated, {d['ce_zero']:.4f} zero-ablated",
        f"  delta CE       {d['delta_ce']:.4f} ± {d['delta_ce_interval']:.4f}",
        f"  KL             {d['kl']:.4f} ± {d['kl_interval']:.4f}",
    ]
    for name in ("mean", "zero"):
        value = d[f"recovered_{name}"]
        text = f"{100 * value:.2f}%" if value is not None else "undefined: ablation does no harm"
        lines.append(f"  CE recovered   {text} (against {name}-ablation)")
    return lines
