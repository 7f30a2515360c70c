"""`saescope attention`: which families of features share the attention heads of an SAE's layer."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from activations import ActivationStore, Model
from activations.models.attention import LONGEST
from sae.analysis.attention.families import GROUPS, FeatureSources, feature_sources
from sae.analysis.attention.head_table import NAMES, head_table
from sae.analysis.attention.heads import HeadAttribution, attention_site, head_attribution
from sae.analysis.attention.prefix import (
    PrefixCurve,
    PrefixTest,
    prefix_attention,
    prefix_tests,
    prefix_texts,
)
from sae.analysis.attention.results_file import (
    ATTENTION_FILE,
    ATTENTION_KIND,
    KIND,
    SCHEMA,
)
from sae.analysis.attention.source_classes import CLASSES, FAMILIES, Distances
from sae.core.base import SparseAutoencoder
from sae.data.harvests import load_harvested_model, open_harvest
from sae.data.provenance import weights_hash
from sae.evaluation.written import EVALUATION_FILE
from sae.formats.hub import evaluation_file
from sae.formats.load import load
from saescope.artefact import write_report
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.paths import AnyPath, as_path
from saescope.progress import Progress, say
from saescope.replacing import check_replaceable
from saescope.seals import sealed

_INDUCTION = FAMILIES.index("induction")


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(Config):
    """Say which families of features share the heads of a layer, and how induction ones act."""

    run: str
    """Folder of the run of an SAE at attention's outputs (attn.hook_z, hook_attn_out)."""
    harvest: str | None = None
    """Harvest whose text is read; the one that it was trained on if not given."""
    site: str | None = None
    """Where, for an SAE of several layers."""
    texts: int = 128
    """Sequences of the harvest to run, held-out ones first; up to 1,024 tokens of each."""
    near: int = 4
    """How many tokens back a local source may be."""
    far: int = 32
    """From how many tokens back on a source is long-range."""
    least: int = 10
    """A feature that fires more seldom belongs to no head."""
    tested: int = 4
    """Induction features to put to the prefix-length test, and as many others beside them."""
    lengths: tuple[int, ...] = (1, 2, 3, 4, 6, 8)
    """Of the repeated prefixes, in tokens."""
    prefix_texts: int = 12
    """Texts of random tokens in each test; 64 tokens each."""
    seed: int = 0
    """Of random directions, random texts, and draws for intervals."""
    out: str | None = None
    """File to write; attention.json in the run's folder, where the explorer finds it."""

    def __post_init__(self) -> None:
        check_range("texts", self.texts, low=GROUPS)
        check_range("least", self.least, low=1)
        check_range("tested", self.tested, low=0)
        check_range("prefix_texts", self.prefix_texts, low=2)
        Distances(near=self.near, far=self.far)


def attention(config: AttentionConfig) -> dict[str, Any]:
    """Measure, print and write what `attention.json` has; that.

    Raises InputError for an SAE elsewhere, or something else at the file's path; ArtefactError if
    something cannot be read.
    """
    out = as_path(config.out) if config.out is not None else attention_file(config.run)
    check_replaceable(out, ATTENTION_KIND, replace=True)
    sae = load(config.run)
    harvest, placement = open_harvest(sae, config.harvest, config.site)
    (site,) = placement.read
    attention_site(site)
    texts = list(_texts(harvest, config.texts))
    model = load_harvested_model(harvest, "float32")
    prefix_texts(model, [0], lengths=config.lengths)  # says now what is wrong with them
    sources = feature_sources(
        model,
        sae,
        texts,
        distances=Distances(near=config.near, far=config.far),
        site=site,
        seed=config.seed,
    )
    heads = head_attribution(model, sae, site=site, seed=config.seed)
    rows = head_table(sources, heads, least=config.least, seed=config.seed)
    found = {
        "kind": KIND,
        "schema": SCHEMA,
        "sae_hash": weights_hash(placement.sae),
        "site": site,
        "layer": heads.layer,
        "protocol": _protocol(config, harvest, texts),
        "random_top_share": heads.random_top_share,
        "outside": float(heads.outside.mean()),
        "unique": heads.unique,
        "heads": [asdict(row) for row in rows],
        "features": _features(sources, heads, config.least),
        "prefix": _prefix(config, model, sae, site, sources),
        "prefix_heads": _prefix_heads(config, model, heads.layer),
    }
    write_report(out, sealed(found), ATTENTION_KIND, replace=True)
    for line in lines(found):
        say(line)
    say(f"{out}: {len(rows)} heads")
    return found


def attention_file(run: str) -> AnyPath:
    """Where it is written: into an SAE's or a run's folder; of one on the hub, here.

    >>> attention_file("runs/x").name, attention_file("hf://me/saes/z").name
    ('attention.json', 'me--saes--z.attention.json')
    """
    path = evaluation_file(run)
    return path.with_name(path.name.removesuffix(EVALUATION_FILE) + ATTENTION_FILE)


def _texts(harvest: ActivationStore, count: int) -> Iterator[list[int]]:
    """Token ids of sequences, held-out ones first, without the padding at their end.

    Raises InputError for a harvest of fewer.
    """
    held_out = np.flatnonzero(harvest.split == 1).tolist()
    every = [*held_out, *np.flatnonzero(harvest.split == 0).tolist()]
    if len(every) < count:
        raise InputError(
            "the harvest has fewer sequences", where="texts", given=count, allowed=f"{len(every)}"
        )
    for number in sorted(every[:count]):
        real = np.asarray(harvest.document[number]) >= 0
        yield np.asarray(harvest.tokens[number])[real][:LONGEST].tolist()


def _protocol(
    config: AttentionConfig, harvest: ActivationStore, texts: Sequence[Sequence[int]]
) -> dict[str, Any]:
    named = ("near", "far", "least", "prefix_texts", "seed")
    return {
        "harvest": str(harvest.path),
        "harvest_hash": harvest.hash,
        "texts": len(texts),
        "tokens": sum(map(len, texts)),
        "held_out": min(len(texts), int((harvest.split == 1).sum())),
        **{name: getattr(config, name) for name in named},
    }


def _features(sources: FeatureSources, heads: HeadAttribution, least: int) -> dict[str, Any]:
    """A column a property, of the features that fire often enough."""
    often = np.flatnonzero(sources.firings >= least)
    shares, random = (sources.shares(random=each)[often] for each in (False, True))
    top = heads.top_head.numpy()[often]
    return {
        "feature": often.tolist(),
        "head": top.tolist(),
        "head_share": heads.share.numpy()[often, top].round(5).tolist(),
        "firings": sources.firings[often].tolist(),
        "family": [NAMES[n] for n in sources.families()[often]],
        "random_family": [NAMES[n] for n in sources.families(random=True)[often]],
        "read_token": sources.token[often].tolist(),
        "shares": {name: shares[:, n].round(5).tolist() for n, name in enumerate(CLASSES)},
        "random_shares": {name: random[:, n].round(5).tolist() for n, name in enumerate(CLASSES)},
    }


def _prefix(
    config: AttentionConfig,
    model: Model,
    sae: SparseAutoencoder,
    site: str,
    sources: FeatureSources,
) -> list[dict[str, Any]]:
    """Tests of the features that go most by induction, and of as many others, drawn."""
    families, shares = sources.families(), sources.shares()
    special = np.isin(sources.token, [-1, *model.special_token_ids])
    able = (sources.firings >= config.least) & ~special
    order = np.argsort(-np.nan_to_num(shares[:, CLASSES.index("induction")]), kind="stable")
    induction = [f for f in order if able[f] and families[f] == _INDUCTION][: config.tested]
    rest = np.flatnonzero(able & (families != _INDUCTION))
    draw = np.random.default_rng(config.seed)
    others = draw.choice(rest, min(len(induction), len(rest)), replace=False)
    tested = [("induction", f) for f in induction] + [("other", f) for f in others]
    tokens = {int(f): int(sources.token[f]) for _, f in tested}
    found: dict[int, PrefixTest] = {}
    with Progress("features on repeats", len(tested), "features") as progress:
        for token in dict.fromkeys(tokens.values()):
            own = [f for f in tokens if tokens[f] == token]
            tests = prefix_tests(
                model,
                sae,
                own,
                token,
                lengths=config.lengths,
                texts=config.prefix_texts,
                seed=config.seed,
                site=site,
            )
            found |= {test.feature: test for test in tests}
            progress.advance(len(own))
    rows = []
    for chosen, feature in tested:
        test = found[int(feature)]
        named = {"chosen": chosen, "feature": int(feature), "next_token": test.next_token}
        named["text"] = model.token_strings([test.next_token])[0]
        curves = {"activation": curve(test.activation), "log_prob": curve(test.log_prob)}
        rows.append({**named, **curves})
    return rows


def _prefix_heads(config: AttentionConfig, model: Model, layer: int) -> list[dict[str, Any]]:
    curves = prefix_attention(
        model, layer, lengths=config.lengths, texts=config.prefix_texts, seed=config.seed
    )
    return [{"head": head, **curve(each)} for head, each in enumerate(curves)]


def curve(found: PrefixCurve) -> dict[str, Any]:
    """A curve as JSON: means, effect and half of its 95% interval by length, and the verdict."""
    return {
        "lengths": list(found.lengths),
        "repeated": found.repeated.mean(1).tolist(),
        "shuffled": found.shuffled.mean(1).tolist(),
        "effect": found.effect.tolist(),
        "half_width": found.half_width().tolist(),
        "half_length": found.half_length,
        "verdict": found.verdict,
    }


def lines(found: dict[str, Any]) -> list[str]:
    """What was found, for people."""
    protocol = found["protocol"]
    made = [
        f"{found['site']}: {protocol['texts']} texts, {protocol['tokens']:,} tokens; "
        f"{len(found['features']['feature']):,} features fire {protocol['least']} times or more",
        "share of a head's features in each family (of random directions read there)",
        f"{'head':>4} {'features':>8} "
        + " ".join(f"{name:>15}" for name in NAMES)
        + f" {'families':>8} {'any heads':>11} {'repeat':>12}",
    ]
    for row, head in zip(found["heads"], found["prefix_heads"], strict=True):
        cells = [
            f"{row['shares'].get(name, 0):>7.0%} ({row['random'].get(name, 0):>4.0%})"
            for name in NAMES
        ]
        families, others = "", ""
        if row["features"]:
            families = f"{row['effective']:.2f}"
            others = "{:.2f}-{:.2f}".format(*row["others"])
        made.append(
            f"{row['head']:>4} {row['features']:>8,} "
            + " ".join(f"{cell:>15}" for cell in cells)
            + f" {families:>8} {others:>11} {head['verdict']:>12}"
        )
    for each in found["prefix"]:
        measured = each["activation"]
        made.append(
            f"feature {each['feature']} ({each['chosen']}), before {each['text']!r}: "
            f"{measured['verdict']}, activation above its null by prefix length: "
            + ", ".join(
                f"{n}: {effect:.2f} ± {half:.2f}"
                for n, effect, half in zip(
                    measured["lengths"], measured["effect"], measured["half_width"], strict=True
                )
            )
        )
    return made
