r"""Which estimate of a feature's effect on the next token foretells its effect elsewhere.

    python -m benchmarks.effect_agreement --store stores/smollm2-135m-topk-quick

Of random features that fire in enough of some random sequences, the change of log-probabilities is
measured at positions in as many sequences. Half of these are held out; the estimates are compared
with the mean change there: the direct effect of the decoder, the mean Jacobian from the site to the
logits over random positions, and the mean change measured at 1, 2 and 4 other positions.
The null is the change that was measured of another feature. A row an estimate: the median over
features of Pearson's correlation over the vocabulary and of how many of the ten most raised tokens
are the same, each with its 95 % bootstrap interval over features.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations.models.variants import Variants
from benchmarks.running import run
from sae.bench import rows as results
from sae.commands.effects import EffectsConfig, loaded
from sae.indexing.build import direct_logits
from sae.indexing.effect_summary import pearson
from sae.indexing.effects import directions_of
from saescope.config import Config
from saescope.progress import Progress, say
from store import FeatureStore

COLUMNS = (
    "date", "store", "estimate", "features", "held_out", "contexts", "correlation",
    "correlation_low", "correlation_high", "same_of_ten", "same_low", "same_high", "seed",
    "processor", "threads", "saescope", "commit",
)  # fmt: skip
_STEP = 0.01
"""of finite differences, in lengths of the activation"""
_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class EffectAgreementConfig(Config):
    """Compare estimates of features' effects with those at held-out positions."""

    store: str
    """Folder of the feature store."""
    features: int = 64
    """How many features are compared."""
    sequences: int = 100
    """Random sequences in which they are measured."""
    positions: int = 8
    """Positions of each feature, in as many sequences; half are held out."""
    contexts: int = 32
    """Positions that the Jacobian is averaged over."""
    seed: int = 0
    """Seed of all random choices."""
    results: str = "benchmarks/results/effect_agreement.csv"
    """File that rows are added to."""


@torch.inference_mode()
def compare(config: EffectAgreementConfig) -> None:
    """Measure, compare, and add the rows."""
    with FeatureStore.open(config.store) as store:
        variants, placement = loaded(store, EffectsConfig(store=config.store))
        directions = directions_of(store, placement, config.seed)
        rng = np.random.default_rng(config.seed)
        sequences = np.sort(rng.choice(store.meta["n_sequences"], config.sequences, replace=False))
        pairs = _pairs(store, sequences, config, rng)
        drawn = _drawn(store, sequences, config.contexts, rng)
        changes, jacobian = _measured(store, variants, directions.typical, pairs, drawn)
        name = str(store.meta["name"])
    features = np.unique(pairs[:, 0])
    half = config.positions // 2
    held_out = torch.stack([changes[pairs[:, 0] == f][half:].mean(0) for f in features])
    others = [changes[pairs[:, 0] == f][:half] for f in features]
    W_U, norm = variants.model.unembedding()
    centred = variants.model.final_norm_centres
    chosen = directions.typical[torch.from_numpy(features)]
    estimates = {
        ("direct", 0): direct_logits(chosen, W_U, norm, centred=centred),
        ("mean Jacobian", config.contexts): chosen @ jacobian @ W_U,
    }
    for count in (1, 2, 4):
        if count <= half:
            estimates["measured", count] = torch.stack([each[:count].mean(0) for each in others])
    estimates["another feature, measured", half] = estimates["measured", min(half, 4)].roll(1, 0)
    written = []
    machine = {name: each for name, each in results.facts("cpu").items() if name in COLUMNS}
    for (estimate, contexts), values in estimates.items():
        row = _row(values, held_out, np.random.default_rng(config.seed))
        say(f"{estimate} ({contexts}): {row['correlation']} {row['same_of_ten']}")
        facts = {"store": name, "estimate": estimate, "features": len(features), "held_out": half}
        written.append({**machine, **facts, "contexts": contexts, "seed": config.seed, **row})
    results.append(Path(config.results), written, COLUMNS)


def _row(values: Tensor, held_out: Tensor, rng: np.random.Generator) -> dict[str, float]:
    correlations = [pearson(a, b) for a, b in zip(values, held_out, strict=True)]
    tops = zip(values.topk(10).indices.tolist(), held_out.topk(10).indices.tolist(), strict=True)
    same = [len(set(a) & set(b)) for a, b in tops]
    row = {}
    for name, found, end in (
        ("correlation", correlations, "correlation"),
        ("same_of_ten", same, "same"),
    ):
        kept = np.array(found, float)
        middle = np.median if name == "correlation" else np.mean
        drawn = middle(kept[rng.integers(0, len(kept), (2000, len(kept)))], axis=1)
        low, high = np.quantile(drawn, (0.025, 0.975))
        row |= {name: round(float(middle(kept)), 4)}
        row |= {f"{end}_low": round(float(low), 4), f"{end}_high": round(float(high), 4)}
    return row


def _pairs(
    store: FeatureStore,
    sequences: NDArray[np.int64],
    config: EffectAgreementConfig,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Feature, sequence and index [pairs, 3] of random features, each in several sequences."""
    rows = []
    for sequence in sequences.tolist():
        found = store.features_of_sequence(sequence)
        order = rng.permutation(len(found.feature))
        known, first = np.unique(found.feature[order], return_index=True)
        at = found.position[order][first]
        rows.append(np.stack([known, at // store.context, at % store.context], 1))
    every = np.concatenate(rows).astype(np.int64)
    known, counts = np.unique(every[:, 0], return_counts=True)
    enough = known[counts >= config.positions]
    chosen = rng.choice(enough, min(config.features, len(enough)), replace=False)
    say(f"{len(enough):,} features fire in {config.positions} of {len(sequences)} sequences")
    kept = []
    for feature in np.sort(chosen):
        own = every[every[:, 0] == feature]
        kept.append(own[rng.permutation(len(own))[: config.positions]])
    return np.concatenate(kept)


def _drawn(
    store: FeatureStore, sequences: NDArray[np.int64], count: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Sequence and index [contexts, 2] of kept positions."""
    chosen = rng.choice(sequences, min(count, len(sequences)), replace=False)
    return np.stack([chosen, rng.integers(1, store.context, len(chosen))], 1)


def _measured(
    store: FeatureStore,
    variants: Variants,
    typical: Tensor,
    pairs: NDArray[np.int64],
    drawn: NDArray[np.int64],
) -> tuple[Tensor, Tensor]:
    """Changes of log-probabilities [pairs, d_vocab]; mean Jacobian [d_out, d_model] from the site
    to what the unembedding multiplies."""
    changes = torch.zeros(len(pairs), variants.model.d_vocab)
    norm = variants.logits.norm
    jacobian = torch.zeros(typical.shape[1], variants.model.d_model)
    known = np.unique(np.concatenate([pairs[:, 1], drawn[:, 0]]))
    with Progress("sequences", len(known), "sequences") as progress:
        for sequence in known.tolist():
            sql = "SELECT tokens FROM db.sequence WHERE sequence = ?"
            [(tokens,)] = store.database.rows(sql, [sequence])
            text = variants.text(tokens)
            mine = torch.from_numpy(np.flatnonzero(pairs[:, 1] == sequence))
            at = torch.from_numpy(pairs[mine.numpy(), 2])
            if len(mine):
                after = text.after_each(at, typical[torch.from_numpy(pairs[mine.numpy(), 0])])
                before = variants.logits(text.residual[at]).log_softmax(1)
                changes[mine] = variants.logits(after).log_softmax(1) - before
            for index in drawn[drawn[:, 0] == sequence, 1].tolist():
                step = _STEP * float(text.activation[index].norm())
                basis = step * torch.eye(len(jacobian))
                moved = torch.cat([text.after(index, rows) for rows in basis.split(_ROWS)])
                still = text.after(index, torch.zeros(1, len(jacobian)))
                jacobian += (norm(moved) - norm(still)) / step / len(drawn)
            progress.advance(1)
    return changes, jacobian


if __name__ == "__main__":
    run(EffectAgreementConfig, compare)
