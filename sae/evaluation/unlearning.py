"""Unlearning by clamping, with its side effects, beside random features.

Definitions are in `sae.probing.unlearning`; the protocol is docs/reference/removal.md.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from sae.core.base import SparseAutoencoder
from sae.evaluation import OwnTexts, metric_family
from sae.evaluation.clamping import Clamp, Clamping, on_sets
from sae.evaluation.on_texts import OnTexts, subject_of
from sae.evaluation.paired import named
from sae.evaluation.ranks import DIFFERENCE
from sae.probing import text_rows
from sae.probing import unlearning as definitions
from sae.probing.kept_rows import Row
from sae.probing.labelled_sets import SetSource, labelled_sets
from sae.probing.removal_tables import write_removal
from sae.probing.unlearning import alike, firing, of_subject
from sae.probing.unlearning_config import UnlearningConfig
from saescope.errors import InputError
from saescope.metrics import Metric
from saescope.paths import AnyPath, remove
from saescope.progress import say

_UNDEFINED = "no clamp harms retained texts so little"
_FARRELL = "Farrell et al. 2024 (arXiv 2410.19278)"


def _metric(name: str, label: str, better: Any, text: str, source: str = "") -> Metric:
    return Metric(
        name=f"unlearning_{name}",
        label=label,
        unit="nats",
        form="+.3f",
        better=better,
        help=text,
        source=source,
        interval=True,
        undefined=_UNDEFINED,
    )


METRICS = (
    _metric(
        "forget",
        "forgotten",
        "higher",
        "How much cross-entropy rises on texts of a subject when features that fire on it and "
        "hardly elsewhere are clamped to negative values: with the clamp that does most there and "
        "raises it by at most 1% on other texts. Read it beside random features.",
        _FARRELL,
    ),
    _metric(
        "retain",
        "side effect",
        "lower",
        "How much this clamp raises cross-entropy on other texts.",
    ),
    _metric(
        "retain_kl",
        "side effect, KL",
        "lower",
        "Divergence of the next-token distribution with this clamp from the model's own, on other "
        "texts.",
    ),
    _metric(
        "forget_random",
        "forgotten, random",
        "neither",
        "How much it rises on texts of the subject when as many features of equal firing rate are "
        "clamped, drawn at random.",
    ),
    _metric(
        "retain_random",
        "side effect, random",
        "neither",
        "How much these raise cross-entropy on other texts.",
    ),
    _metric(
        "forget_untrained",
        "forgotten, untrained",
        "neither",
        "The first of an SAE of the same shape that was never trained, with the same clamp.",
    ),
)


def _source(config: UnlearningConfig) -> SetSource:
    sets = labelled_sets([config.subject])
    if len(sets) != 1:
        raise InputError(
            "stands for several sets; a subject is one",
            where="unlearning.subject",
            given=config.subject,
        )
    return next(iter(sets.values()))


def facts(config: UnlearningConfig, model: Mapping[str, Any], site: str) -> dict[str, Any]:
    """Settings, and what decides the rows of texts, with the sha256 of every file of them."""
    return {
        "version": definitions.VERSION,
        **asdict(config),
        "rows": text_rows.protocol(model, site, "mean", config.max_tokens),
        "sources": [asdict(origin) for origin in _source(config).origins()],
    }


@dataclass(frozen=True, kw_only=True)
class Texts:
    """Texts of a subject and others, for each purpose."""

    features: dict[str, list[str]]
    """those that choose features, of "forget" and "retain\""""
    choice: dict[str, list[str]]
    """those that choose the clamp"""
    test: dict[str, list[str]]


def divided(texts: Sequence[str], labels: Any, most: int) -> Texts:
    """Half of the texts for features, a quarter for the choice of a clamp, a quarter for the test.

    Raises InputError for fewer than sixteen texts with the label or without.
    """
    parts: list[dict[str, list[str]]] = [{}, {}, {}]
    draw = np.random.default_rng(0)
    for name, wanted in (("forget", True), ("retain", False)):
        own = [text for text, label in zip(texts, labels.tolist(), strict=True) if label == wanted]
        if len(own) < 16:
            raise InputError(
                "needs 16 texts with the label and as many without",
                where="unlearning.subject",
                given=f"{len(own)} {'with' if wanted else 'without'} it",
            )
        chosen = [own[each] for each in draw.permutation(len(own))[:most]]
        half, quarter = len(chosen) // 2, len(chosen) // 4
        pieces = chosen[:half], chosen[half : half + quarter], chosen[half + quarter :]
        for part, piece in zip(parts, pieces, strict=True):
            part[name] = piece
    return Texts(features=parts[0], choice=parts[1], test=parts[2])


def _clamps(
    sae: SparseAutoencoder, rows: Mapping[str, Tensor], config: UnlearningConfig, method: str
) -> list[Clamp]:
    """The clamps of an SAE, from activations of the texts that choose features; none without a
    feature of the subject."""
    forget, retain = firing(sae, rows["forget"]), firing(sae, rows["retain"])
    both = forget.plus(retain)
    order = of_subject(forget, retain, config.sparse)
    found = []
    for n in config.ns:
        for strength in config.strengths:
            for draw in range(config.draws if method == "random" else 1):
                used = alike(order[:n], both, draw) if method == "random" else order[:n]
                about = Clamp(method, n, strength, draw, tuple(used.tolist()))
                found.append(about._replace(mean=tuple(both.mean[used].tolist())))
    return [each for each in found if each.features]


def best_clamp(rows: Sequence[Row], harm: float) -> Row | None:
    """The clamp that raises cross-entropy most on texts to be forgotten, of those that raise it by
    no more than a share `harm` on the others."""
    able = [row for row in rows if row["retain_rise"] <= harm * row["retain_clean"]]
    return max(able, key=lambda row: row["forget_rise"], default=None)


def _lines(rows: list[Row]) -> Iterator[str]:
    yield f"  {'':<22}{'n':>4}{'clamp':>7}{'forgotten':>11}{'side effect':>13}"
    for row in rows:
        name = f"{row['method']} ({row['texts']})"
        yield (
            f"  {name:<22}{row['n']:>4}{row['strength']:>7g}{row['forget_rise']:>+11.4f}"
            f"{row['retain_rise']:>+13.4f}"
        )


def _write(evaluation: AnyPath, rows: list[Row], protocol_hash: str) -> None:
    write_removal(evaluation, "unlearning", [], rows, protocol_hash)


@metric_family(
    "unlearning",
    needs="texts",
    metrics=METRICS,
    suite="unlearning",
    texts=OwnTexts(
        settings=UnlearningConfig,
        facts=facts,
        counted=("forget_texts", "texts of a subject"),
        unit="texts",
        write=_write,
        lines=_lines,
        controls={
            "unlearning_forget": {
                "random": "unlearning_forget_random",
                "untrained": "unlearning_forget_untrained",
            },
            "unlearning_retain": {"random": "unlearning_retain_random"},
        },
    ),
)
def unlearning(given: OnTexts[UnlearningConfig]) -> dict[str, Any]:
    """Choose features and a clamp, and measure it; a row for each clamp goes into `given.tables`.

    Raises InputError for a transcoder, an SAE behind a lens, an unknown set, or too few texts.
    """
    config = given.settings
    if given.sae.metadata.get("lens"):
        raise InputError(
            "unlearning is of SAEs of the model's own activations, and this is behind a tuned lens",
            where="suite",
            given="unlearning",
        )
    subject = subject_of(given, "unlearning", "mean", config.max_tokens)
    data = _source(config).read()
    texts = divided(data.texts, data.labels, config.texts)
    rows = {
        name: subject.cache.rows(f"{data.name}-{name}", own).x
        for name, own in texts.features.items()
    }
    clamping = Clamping(
        of=subject.cache.of,
        sae=subject.sae,
        untrained=subject.untrained,
        kept=given.cache / f"results-unlearning-{given.sae_hash[:16]}",
        key=[facts(config, given.model.facts(), given.site), given.sae_hash],
    )
    table = on_sets(clamping, _clamps(subject.sae, rows, config, "sae"), texts.choice, "clamps")
    best = best_clamp(table, config.harm)
    tested: list[Row] = []
    if best is None:
        say(f"unlearning: {_UNDEFINED}")
    else:
        same = replace(config, ns=(best["n"],), strengths=(best["strength"],))
        of_method = {"sae": subject.sae, "random": subject.sae, "untrained": subject.untrained}
        chosen = [c for method, sae in of_method.items() for c in _clamps(sae, rows, same, method)]
        tested = on_sets(clamping, chosen, texts.test, "the chosen clamp", beside="sae")
    given.tables["unlearning"] = [
        *({"texts": "choice", **row} for row in table),
        *({"texts": "test", **row} for row in tested),
    ]
    remove(clamping.kept)
    return {"forget_texts": len(texts.test["forget"]), **summary(tested)}


def summary(tested: Sequence[Row]) -> dict[str, Any]:
    """The metrics, from the rows of test texts; undefined where there are none."""
    by_method = {row["method"]: row for row in tested}
    found: dict[str, Any] = {}
    for name, method, value in (
        ("forget", "sae", "forget_rise"),
        ("retain", "sae", "retain_rise"),
        ("retain_kl", "sae", "retain_kl"),
        ("forget_random", "random", "forget_rise"),
        ("retain_random", "random", "retain_rise"),
        ("forget_untrained", "untrained", "forget_rise"),
    ):
        row = by_method.get(method)
        found[f"unlearning_{name}"] = None if row is None else row[value]
        if row is not None:
            found[f"unlearning_{name}_interval"] = row[f"{value}_interval"]
            if method != "sae":
                ends = (f"{value}_{DIFFERENCE}", f"{value}_{DIFFERENCE}_interval")
                found |= named(f"unlearning_{name}", *(row[end] for end in ends))
    return found
