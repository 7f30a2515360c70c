"""A language model in which features are clamped, and what that does to the loss on texts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.evaluation.divergence import divergence_in_place
from sae.evaluation.in_model import Splice
from sae.evaluation.intervals import half_width
from sae.evaluation.paired import named
from sae.probing.kept_rows import Row, kept_rows
from sae.probing.text_rows import TextModel, of_one_length
from sae.probing.unlearning import clamp_values, clamped
from saescope.artefact import sha256_json
from saescope.errors import InputError
from saescope.progress import Progress

_TOKENS = 1024
"""tokens of a run of the model, whose logits are kept beside those of a clamp"""


class Clamp(NamedTuple):
    """Features that are clamped, and how."""

    method: str
    """sae, random or untrained"""
    n: int
    strength: float
    draw: int
    features: tuple[int, ...]
    mean: tuple[float, ...] = ()
    """activation of each where it fires"""


@dataclass(frozen=True, kw_only=True)
class Clamping:
    """A model in which features are clamped, and where results of batches are kept."""

    of: TextModel
    sae: SparseAutoencoder
    untrained: SparseAutoencoder
    kept: Path
    key: list[Any]
    """what decides the results, besides clamps and texts"""

    def measure(self, clamps: Sequence[Clamp], texts: Sequence[str], what: str) -> list[Row]:
        """For each text and clamp the sums over its tokens, a row each; none without clamps.

        Raises InputError if no text has two kept tokens.
        """
        if not clamps:
            return []
        ids = self.of.tokens(texts)
        batches = list(of_one_length(ids, _TOKENS))
        rows: list[Row] = []
        with Progress(what, len(batches), "batches") as progress:
            for batch in batches:
                tokens = [ids[each] for each in batch]
                key = sha256_json([self.key, [each._asdict() for each in clamps], tokens])
                compute = partial(self._batch, clamps, tokens)
                found = kept_rows(self.kept / f"{key[:32]}.json", compute, what)
                rows += [{**row, "text": batch[row["text"]]} for row in found]
                progress.advance()
        if not rows:
            raise InputError("no text has two kept tokens", where=what, given=len(texts))
        return rows

    @torch.inference_mode()
    def _batch(self, clamps: Sequence[Clamp], ids: Sequence[Sequence[int]]) -> Iterator[Row]:
        model, tokens = self.of.model, torch.tensor(ids)
        keep = model.keep_mask(tokens)
        splice = Splice(model, [self.of.site], [self.of.site])
        counted = keep[:, :-1].cpu()

        def cross_entropy(logits: Tensor) -> Tensor:
            target = tokens[:, 1:, None].to(logits.device)
            return (logits.logsumexp(-1) - logits.gather(-1, target)[..., 0]).double().cpu()

        with splice.reading(keep):
            clean = model.logits(tokens)[:, :-1].float()
        before = cross_entropy(clean)
        for number, clamp in enumerate(clamps):
            sae = self.untrained if clamp.method == "untrained" else self.sae
            mean = np.zeros(sae.d_sae)
            mean[list(clamp.features)] = clamp.mean
            values = clamp_values(clamp.features, mean, clamp.strength)
            with splice.replacing(partial(clamped, sae, values=values), keep):
                logits = model.logits(tokens)[:, :-1].float()
            after = cross_entropy(logits)
            kl = divergence_in_place(clean.clone(), logits).double().cpu()
            sums = [(each * counted).sum(1).tolist() for each in (before, after, kl)]
            for text, (one, two, three) in enumerate(zip(*sums, strict=True)):
                if count := int(counted[text].sum()):
                    row = {"clamp": number, "text": text, "tokens": count}
                    yield {**row, "ce_clean": one, "ce": two, "kl": three}


def _means(rows: Sequence[Row], wanted: Sequence[int]) -> dict[str, float | None]:
    """Cross-entropy, its rise and the divergence, over tokens of texts with some clamps."""
    own = [row for row in rows if row["clamp"] in wanted]
    texts = sorted({row["text"] for row in own})
    tokens = torch.zeros(len(texts), dtype=torch.float64)
    sums = {name: tokens.clone() for name in ("clean", "rise", "kl")}
    index = {text: number for number, text in enumerate(texts)}
    for row in own:
        at = index[row["text"]]
        tokens[at] += row["tokens"]
        sums["clean"][at] += row["ce_clean"]
        sums["rise"][at] += row["ce"] - row["ce_clean"]
        sums["kl"][at] += row["kl"]
    found: dict[str, float | None] = {}
    for name, each in sums.items():
        found[name] = float(each.sum() / tokens.sum())
        found[f"{name}_interval"] = half_width(each, tokens)
    return found


def rise_difference(
    rows: Sequence[Row], wanted: Sequence[int], others: Sequence[int]
) -> tuple[float, float | None]:
    """How much more cross-entropy rises with some clamps than with others, in nats a token, and
    half of its 95% interval with texts as the unit; of several clamps it is their mean.

    rows: of the same texts with each clamp.
    """
    texts = sorted({row["text"] for row in rows})
    index = {text: number for number, text in enumerate(texts)}
    beyond, tokens = torch.zeros(2, len(texts), dtype=torch.float64)
    for clamps, sign in ((wanted, 1), (others, -1)):
        for row in (each for each in rows if each["clamp"] in clamps):
            at = index[row["text"]]
            beyond[at] += sign * (row["ce"] - row["ce_clean"]) / len(clamps)
            tokens[at] = row["tokens"]
    return float(beyond.sum() / tokens.sum()), half_width(beyond, tokens)


def on_sets(
    clamping: Clamping,
    clamps: Sequence[Clamp],
    texts: Mapping[str, list[str]],
    what: str,
    *,
    beside: str | None = None,
) -> list[Row]:
    """A row for each clamp, its draws together: what it does to texts of the subject and others.

    Args: beside is a method of one clamp: rows of other methods say how much more cross-entropy
    rises with it than with theirs, text by text.
    """
    first = [number for number, each in enumerate(clamps) if each.method == beside]
    rows = {name: clamping.measure(clamps, own, f"{what}, {name}") for name, own in texts.items()}
    found = []
    for key in dict.fromkeys((each.method, each.n, each.strength) for each in clamps):
        wanted = [i for i, each in enumerate(clamps) if (each.method, each.n, each.strength) == key]
        features = [list(clamps[each].features) for each in wanted]
        row = {"method": key[0], "n": key[1], "strength": key[2], "features": features}
        for name, own in rows.items():
            row |= {f"{name}_{value}": v for value, v in _means(own, wanted).items()}
            if first and key[0] != beside:
                row |= named(f"{name}_rise", *rise_difference(own, first, wanted))
        found.append(row)
    return found
