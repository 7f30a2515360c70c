"""`saescope effects`: measure what a model makes of a store's features, and add it to the store."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from activations import load_model
from activations.models.variants import Variants
from sae.data.placement import Placement
from sae.data.provenance import check_indexed
from sae.formats.load import load
from sae.indexing.build import direct_logits
from sae.indexing.effect_summary import Measured, Summary, effects, quantiles
from sae.indexing.effects import (
    Directions,
    directions_of,
    measured_residuals,
    plan_of,
    steering_scores,
)
from sae.indexing.pending import Pending
from sae.steering.scores import PROMPT
from sae.steering.steer import placement_in
from saescope.config import Config
from saescope.errors import ArtefactError, InputError, check_range
from saescope.progress import say
from saescope.system import system_errors
from store import FeatureStore
from store.database import store_file
from store.measured import EFFECTS, add_measured


@dataclass(frozen=True, kw_only=True)
class EffectsConfig(Config):
    """Measure the effects of a store's features through the network."""

    store: str
    """Folder of the feature store, to which they are added."""
    positions: int = 4
    """Positions of each feature, where it is active, at which its effect is measured."""
    seconds: float = 600.0
    """Time for measuring effects; what is not reached is left out, and said."""
    features: int = 0
    """Only so many random live features; 0 for all."""
    tokens: int = 10
    """Most raised and most lowered tokens kept of each feature."""
    prompt: str = PROMPT
    """Neutral text at whose end features are amplified, for their output score."""
    replace: bool = False
    """Measure anew even if the store has effects already."""
    seed: int = 0
    """Seed of the positions and of the random directions."""
    trust_remote_code: bool = False
    """Run the code that comes with the model, if it needs it."""

    def __post_init__(self) -> None:
        check_range("positions", self.positions, low=1)
        check_range("features", self.features, low=0)
        check_range("tokens", self.tokens, low=1)
        check_range("seconds", self.seconds, low=0)
        check_range("seed", self.seed, low=0, high=2**20)


@system_errors()
def measure_effects(config: EffectsConfig) -> Path:
    """Measure the effects of a store's live features and add them to it; the path of its file.

    A run that was killed goes on when it is called again: what was measured is kept beside the
    store until the store has it.

    Raises InputError for a store of no language model's activations, or of a crosscoder;
    ArtefactError if its SAE or model cannot be read or have other weights by now.
    """
    path = store_file(config.store)
    if not isinstance(path, Path) or path.suffix != ".duckdb":
        raise InputError("is not in one file, to which effects could be added", where=config.store)
    with FeatureStore.open(path) as store:
        if EFFECTS in store.meta and not config.replace:
            say(f"{path}: has effects already (--replace measures them anew)")
            return path
        variants, placement = loaded(store, config)
        directions = directions_of(store, placement, config.seed, config.features)
        pending = Pending(path.with_name("effects"), _plan(store, config))
        pending.open(replace=True)
        scores = steering_scores(variants, placement, directions, config.prompt, pending)
        plan = plan_of(store, directions, config.positions, config.seed)
        measured = measured_residuals(store, variants, directions, plan, pending, config.seconds)
    columns, rows, facts = _summed_up(config, variants, directions, scores, measured)
    facts["pairs"] = [len(measured.direction), len(plan.direction)]
    add_measured(path, columns, rows, facts)
    pending.remove()
    _report(path, facts, columns)
    return path


def _plan(store: FeatureStore, config: EffectsConfig) -> dict[str, Any]:
    """What measured pieces follow from."""
    names = ("sae_hash", "model_hash", "site", "harvest", "n_activations")
    settings = {name: getattr(config, name) for name in ("positions", "features", "prompt", "seed")}
    return {**{name: store.meta.get(name) for name in names}, **settings}


def loaded(store: FeatureStore, config: EffectsConfig) -> tuple[Variants, Placement]:
    """The store's model, ready at the SAE's site, and the SAE there."""
    meta = store.meta
    for name in ("sae_path", "model_spec"):
        if not isinstance(meta.get(name), str):
            raise InputError(
                "does not say which language model and SAE it was made with",
                where=str(store.path),
                given=f"no {name}",
            )
    sae = load(meta["sae_path"], target_site=meta.get("target_site"))
    check_indexed(sae, meta, where=str(store.path))
    model = load_model(
        meta["model_spec"],
        dtype="float32",
        revision=meta.get("model_revision"),
        trust_remote_code=config.trust_remote_code,
    )
    if model.weights_hash != meta.get("model_hash"):
        raise ArtefactError(
            "this is not the model that the store was made with: its weights are others",
            where=meta["model_spec"],
        )
    site = None if sae.transcodes or sae.concatenates else meta["site"]
    allowed = meta.get("allow_other_model") is True
    placement = placement_in(model, sae, site, where="effects", allow_other_model=allowed)
    return Variants(model, placement.written[0]), placement


@torch.inference_mode()
def _summed_up(
    config: EffectsConfig,
    variants: Variants,
    directions: Directions,
    scores: dict[str, Any],
    measured: Measured,
) -> tuple[dict[str, Any], pa.Table, dict[str, Any]]:
    """Columns of the table of features, rows of that of effects, and what is said of both."""
    model, d_sae = variants.model, directions.d_sae
    W_U, norm = model.unembedding()

    def direct(feature: int) -> torch.Tensor:
        one = directions.vectors[feature : feature + 1]
        return direct_logits(one, W_U, norm, centred=model.final_norm_centres)[0]

    summary = Summary(d_sae, config.tokens)
    for effect in effects(measured, variants.logits):
        summary.add(effect, direct)
    columns = {name: values[:d_sae] for name, values in scores.items()}
    columns |= {"measured_kl": summary.kl, "measured_positions": summary.positions}
    null = summary.null()
    for name, values in scores.items():
        drawn = values[d_sae:]
        if np.isfinite(drawn).any():
            null[name] = quantiles(drawn)
    facts = {
        "prompt": config.prompt,
        "positions": config.positions,
        "seed": config.seed,
        "random_directions": len(directions.stand_ins),
        "null": null,
        "agreement": summary.agreement(),
    }
    return columns, pa.table(summary.rows()), facts


def _report(path: Path, facts: dict[str, Any], columns: dict[str, Any]) -> None:
    done, planned = facts["pairs"]
    reached = int((columns["measured_positions"] > 0).sum())
    short = "" if done == planned else f" of {planned:,} planned: the time was up"
    say(f"{path}: effects of {reached:,} features, measured at {done:,} positions{short}")
    for name, (low, middle, high) in facts["agreement"].items():
        words = name.replace("_", " ")
        say(
            f"correlation with the effect at held-out positions, {words}: "
            f"{middle:.2f} (middle half of features {low:.2f} to {high:.2f})"
        )
