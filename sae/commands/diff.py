"""`saescope diff`: the features that fire more in one group of documents than in another."""

from contextlib import ExitStack
from dataclasses import dataclass

from sae.commands.tables import SUFFIXES, write_table
from saescope.config import Config
from saescope.errors import InputError, check_range
from saescope.paths import local
from saescope.progress import say
from saescope.replacing import check_replaceable
from store import FeatureStore
from store.diff import DatasetDiff, diff


@dataclass(frozen=True, kw_only=True)
class DiffConfig(Config):
    """Compare how often features fire in two groups of documents."""

    store: str
    """Folder of the feature store that the documents of group a are in."""
    a: str
    """The documents of group a: title:PATTERN, key:PATTERN, topic:NAME, source:NAME (several of
    these separated by |), split:train, split:held_out, or all."""
    b: str = "rest"
    """The documents of group b, written alike; rest is all documents that are not in a."""
    other: str | None = None
    """Another store of the same SAE, for group b."""
    permutations: int = 10_000
    """Random divisions of the documents that the observed one is compared with."""
    fdr: float = 0.05
    """Rate of false discoveries among the features found (Benjamini-Hochberg)."""
    min_documents: int = 5
    """A feature that fires in fewer documents of both groups together is not tested."""
    top: int = 20
    """How many features to print."""
    out: str | None = None
    """File to write all features to: .parquet or .csv."""
    seed: int = 0
    """Seed of the random divisions."""

    def __post_init__(self) -> None:
        check_range("top", self.top, low=0)
        if self.out is not None and not self.out.endswith(SUFFIXES):
            raise InputError("no kind of table", where="out", given=self.out, allowed=SUFFIXES)


def run(config: DiffConfig) -> DatasetDiff:
    """Print, and write if asked, which features differ.

    Raises InputError if the groups or the stores do not fit (see `store.diff.diff`), or a file is
    at `out` already; ArtefactError if a store cannot be read or the disk is full.
    """
    out = None if config.out is None else local(config.out)
    if out is not None:
        check_replaceable(out, None, replace=False)
    with ExitStack() as stack:
        store = stack.enter_context(FeatureStore.open(config.store))
        other = None
        if config.other is not None:
            other = stack.enter_context(FeatureStore.open(config.other))
        found = diff(
            store,
            config.a,
            config.b,
            other=other,
            permutations=config.permutations,
            fdr=config.fdr,
            min_documents=config.min_documents,
            seed=config.seed,
        )
        _print(found, store, config.top)
    if out is not None:
        write_table(found.rows, out)
        say(f"{out}: {len(found.rows):,} features")
    return found


def summary(found: DatasetDiff) -> list[str]:
    """What was compared, how, and how many features differ, a line each."""
    lines = [
        f"{name}  {group.name}: {group.documents:,} documents, {group.positions:,} positions"
        for name, group in (("a", found.a), ("b", found.b))
    ]
    up = int((found.differing["difference"].to_numpy() > 0).sum())
    differing = len(found.differing)
    lines.append(
        f"{differing:,} of {found.tested:,} tested features differ (q ≤ {found.fdr:g}): "
        f"{up:,} fire more in a, {differing - up:,} more in b"
    )
    lines.append(
        f"test: {found.permutations:,} permutations of documents, seed {found.seed}; features in "
        f"fewer than {found.min_documents} documents are not tested"
    )
    if found.undecided:
        lines.append(
            f"{found.undecided:,} more are beyond every permutation, but too few were made to tell "
            f"among so many features: try permutations = {10 * found.permutations}"
        )
    return lines


def _print(found: DatasetDiff, store: FeatureStore, top: int) -> None:
    for line in summary(found):
        say(line)
    rows = found.rows.slice(0, top).to_pylist()
    if not rows:
        return
    tokens = store.top_tokens([row["feature"] for row in rows], 4)
    say(f"{'feature':>8} {'density a':>10} {'density b':>10} {'log2 a/b':>9} {'q':>8}  tokens")
    for row in rows:
        q = "-" if row["q"] is None else f"{row['q']:.2g}"
        say(
            f"{row['feature']:>8} {row['density_a']:>10.4%} {row['density_b']:>10.4%} "
            f"{row['log2_ratio']:>+9.2f} {q:>8}  {' '.join(map(repr, tokens[row['feature']]))}"
        )
