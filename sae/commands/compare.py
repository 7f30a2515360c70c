"""`saescope compare`: which SAE is better in what, and which features of two are the same."""

from dataclasses import dataclass
from typing import Literal

from sae.analysis.dictionary_matching import match_codes, match_decoders
from sae.commands.compare_metrics import Scale, evaluations_of, metric_lines
from sae.commands.genealogy import follow, print_genealogy
from sae.commands.tables import SUFFIXES, write_table
from sae.core.base import SparseAutoencoder, kind_of
from sae.data.harvests import open_harvest
from sae.evaluation.comparison import check_one_protocol
from sae.formats.load import load
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.paths import local
from saescope.progress import say
from saescope.replacing import check_replaceable
from store.genealogy import Genealogy
from store.matching import MATCHED, Matching, expected_max_cosine


@dataclass(frozen=True, kw_only=True)
class CompareConfig(Config):
    """Compare the metrics of SAEs, and match the features of two of them."""

    run_a: str
    """Folder of a trained run or of an SAE, in any known format, or its URL: s3://bucket/name,
    hf://owner/repo/folder."""
    run_b: str | None = None
    """The other one. Without it, the features of run_a are followed back through `versions`."""
    others: tuple[str, ...] = ()
    """Further ones, whose metrics are compared with those of run_a."""
    what: Literal["metrics", "features"] | None = None
    """Compare metrics alone, or features alone; if not given, both of two SAEs, and metrics alone
    of three or more. Metrics are those of each one's evaluation.json, of one protocol."""
    reliability: str | None = None
    """File that says the smallest difference each metric can tell (`saescope eval RUN...
    --reliability`); reliability.json beside one of the runs' folders if not given. Without any, the
    evaluations' intervals decide."""
    versions: tuple[str, ...] = ()
    """Earlier versions of run_a, in order: SAEs of any training time, width, seed or layer. If none
    are given, the snapshots that the run kept (`trainer.snapshots`)."""
    by: Literal["decoder", "activations"] = "decoder"
    """What is compared: the cosine of decoder directions, or the correlation of activations over a
    harvest."""
    harvest: str | None = None
    """Harvest for activations; the one that run_a was trained on if not given."""
    site_a: str | None = None
    """The layer to use run_a at, if it is of several or names none; for activations."""
    site_b: str | None = None
    """The same of run_b."""
    rows: int = 65_536
    """Rows to encode for activations, held-out ones first."""
    threshold: float = MATCHED
    """Similarity from which a pair of features counts as matched."""
    top: int = 10
    """How many pairs, or merges and splits of versions, to print."""
    out: str | None = None
    """File to write all pairs, or each feature in each version, to: .parquet or .csv."""
    events: str | None = None
    """File to write all merges and splits of versions to: .parquet or .csv."""

    def __post_init__(self) -> None:
        check_range("top", self.top, low=0)
        check_range("rows", self.rows, low=2)
        check_range("threshold", self.threshold, above=0, high=1)
        for name in ("out", "events"):
            given = getattr(self, name)
            if given is not None and not given.endswith(SUFFIXES):
                raise InputError("no kind of table", where=name, given=given, allowed=SUFFIXES)
        if self.what == "features" and self.others:
            raise InputError(
                "features are those of two SAEs", where="others", given=self.others, allowed="none"
            )
        for name in ("versions", "events"):
            if self.run_b is not None and getattr(self, name):
                raise InputError(
                    "is of one SAE and its versions; leave run_b out",
                    where=name,
                    given=getattr(self, name),
                )
        for name in ("site_b", "reliability") if self.run_b is None else ():
            if getattr(self, name) is not None:
                raise InputError(
                    "is of run_b, which is not given", where=name, given=getattr(self, name)
                )
        if self.what == "metrics" or self.others:
            for name in ("out", "harvest", "site_a", "site_b"):
                if getattr(self, name) is not None:
                    raise InputError(
                        "is about features, and metrics alone are compared",
                        where=name,
                        given=getattr(self, name),
                    )


def compare(config: CompareConfig) -> Matching | Genealogy | None:
    """Print how metrics compare, and which features match; None if metrics alone are asked for.

    Features are two SAEs', or one's through its versions; they are written if that is asked for.

    Raises InputError if the SAEs cannot be compared, metrics because they were measured under two
    protocols, or a file is at `out` or `events` already; ArtefactError if something cannot be read.
    """
    for path in (config.out, config.events):
        if path is not None:
            check_replaceable(local(path), None, replace=False)
    if config.run_b is None:
        return _follow(config)
    alone = config.what == "metrics" or bool(config.others)
    if config.what != "features":
        _compare_metrics(config, (config.run_a, config.run_b, *config.others), alone=alone)
    return None if alone else _match(config, config.run_b)


def _compare_metrics(config: CompareConfig, names: tuple[str, ...], *, alone: bool) -> None:
    """Print metrics; where features come too, metrics may be missing."""
    evaluations = evaluations_of(names)
    missing = [name for name in names if name not in evaluations]
    if missing and (alone or config.reliability is not None):
        raise InputError(
            "not measured yet; `saescope eval` measures it", where="metrics", given=missing
        )
    if missing:
        say(f"metrics are not compared: `saescope eval` has not measured {', '.join(missing)}")
        return
    try:
        check_one_protocol(evaluations)
    except InputError as error:
        if alone:
            raise
        raise InputError(f"{error}; --what features compares their features alone") from None
    for line in metric_lines(evaluations, Scale.of(evaluations, config.reliability)):
        say(line)


def _follow(config: CompareConfig) -> Genealogy:
    found = follow(
        config.run_a,
        config.versions,
        by_activations=config.by == "activations",
        harvest=config.harvest,
        site=config.site_a,
        rows=config.rows,
        threshold=config.threshold,
    )
    print_genealogy(found, top=config.top)
    if config.out is not None:
        write_table(found.table(), local(config.out))
        features, versions = found.similarity.shape[1], len(found.names)
        say(f"{config.out}: {features:,} features in each of {versions} versions")
    if config.events is not None and found.events is not None:
        write_table(found.events, local(config.events))
        say(f"{config.events}: {len(found.events):,} merges and splits")
    return found


def _match(config: CompareConfig, run_b: str) -> Matching:
    a, b = load(config.run_a), load(run_b)
    if config.by == "decoder":
        matching = match_decoders(a, b, threshold=config.threshold)
        chance = expected_max_cosine(a.d_out, b.d_sae)
        say(f"cosine of decoder directions; random ones would have {chance:.3f}")
    else:
        harvest, placement_a = open_harvest(a, config.harvest, config.site_a)
        _, placement_b = open_harvest(b, str(harvest.path), config.site_b)
        matching, rows = match_codes(
            harvest, placement_a, placement_b, rows=config.rows, threshold=config.threshold
        )
        say(f"correlation of activations over {rows:,} rows of {harvest.path}")
    _print(config, (a, b), matching)
    if config.out is not None:
        write_table(matching.pairs, local(config.out))
        say(f"{config.out}: {len(matching.pairs):,} pairs")
    return matching


def _print(
    config: CompareConfig, saes: tuple[SparseAutoencoder, SparseAutoencoder], matching: Matching
) -> None:
    sides = zip(
        ("a", "b"),
        (config.run_a, str(config.run_b)),
        saes,
        (matching.mean_max_a, matching.mean_max_b),
        (matching.unmatched_a, matching.unmatched_b),
        strict=True,
    )
    for name, run, sae, mean, unmatched in sides:
        what = f"{kind_of(sae.config)}, {sae.metadata.get('site') or 'site unknown'}"
        say(
            f"{name}  {run} ({what}): {sae.d_sae:,} features, mean max similarity {mean:.3f}, "
            f"{len(unmatched):,} unmatched"
        )
    say(
        f"{len(matching.matched):,} pairs matched one to one (similarity of at least "
        f"{matching.threshold:g})"
    )
    rows = matching.pairs.slice(0, config.top).to_pylist()
    if rows:
        say(f"{'in a':>8} {'in b':>8} {'similarity':>11}")
    for row in rows:
        say(f"{row['feature_a']:>8} {row['feature_b']:>8} {row['similarity']:>11.4f}")
