"""The part of `saescope compare` that follows an SAE's features back through versions of it."""

from collections.abc import Sequence

from sae.analysis.dictionary_matching import decoder_directions, encoded_alike
from sae.core.base import SparseAutoencoder
from sae.data.harvests import open_harvest
from sae.formats.load import load
from sae.training.snapshots import Snapshot, find_snapshots
from saescope.errors import InputError
from saescope.paths import as_path
from saescope.progress import say
from store.genealogy import Genealogy, genealogy_of_codes, genealogy_of_directions


def follow(
    run: str,
    versions: Sequence[str] = (),
    *,
    by_activations: bool = False,
    harvest: str | None = None,
    site: str | None = None,
    rows: int = 65_536,
    threshold: float,
) -> Genealogy:
    """Follow the features of `run` back through versions, or through the snapshots it kept.

    Raises InputError if there are none, or if they cannot be compared.
    """
    names = list(versions)
    if not versions:
        kept = snapshots_of(run)
        versions = [str(each.path) for each in kept]
        names = [named(each) for each in kept]
    saes = [load(each) for each in (*versions, run)]
    if not by_activations:
        return genealogy_of_directions(
            [decoder_directions(each) for each in saes], names, threshold=threshold
        )
    return _by_activations(saes, names, harvest, site, rows, threshold)


def named(snapshot: Snapshot) -> str:
    """What a version is called that is a snapshot."""
    return f"{snapshot.tokens:,} tokens"


def snapshots_of(run: str) -> list[Snapshot]:
    """The snapshots of a run before its end. InputError if it kept none."""
    found = [each for each in find_snapshots(as_path(run)) if not _is_last(each, run)]
    if not found:
        raise InputError(
            "kept no snapshots to follow its features through: train with --trainer.snapshots 12, "
            "or name another SAE to compare it with (run_b), or earlier ones (--versions)",
            where=run,
        )
    return found


def _is_last(snapshot: Snapshot, run: str) -> bool:
    """Whether a snapshot is of the run's last step, and so the very SAE that is followed."""
    return snapshot.tokens == load(run).metadata.get("tokens_trained")


def _by_activations(
    saes: Sequence[SparseAutoencoder],
    names: Sequence[str],
    harvest: str | None,
    site: str | None,
    rows: int,
    threshold: float,
) -> Genealogy:
    opened, _ = open_harvest(saes[-1], harvest, site)
    placements = [open_harvest(each, str(opened.path), site)[1] for each in saes]
    codes = encoded_alike(opened, placements, rows=rows)
    say(f"activations over {codes[0].shape[0]:,} rows of {opened.path}")
    return genealogy_of_codes(codes, names, threshold=threshold)


def print_genealogy(found: Genealogy, *, top: int) -> None:
    """Print what share of the features each version has, beside a null, and merges and splits."""
    emerged = found.emerged()
    say(
        f"{found.similarity.shape[1]:,} features followed through {len(found.names)} versions; "
        f"found from a similarity of {found.threshold:g} on"
    )
    width = max(len(name) for name in (*found.names, "version"))
    say(
        f"{'version':>{width}} {'found':>8} {'random':>8} {'one to one':>11} {'new to stay':>12} "
        f"{'splits':>7} {'merges':>7}"
    )
    kinds = [] if found.events is None else found.events.to_pylist()
    for number, name in enumerate((*found.names, "the last")):
        events = [each["kind"] for each in kinds if each["version"] == number]
        shares = (f"{1:>8.1%} {'':>8} {'':>11}",)
        if number < len(found.names):
            shares = (
                f"{found.share[number]:>8.1%} {found.null_share[number]:>8.1%} "
                f"{found.matched[number].mean():>11.1%}",
            )
        say(
            f"{name:>{width}} {shares[0]} {(emerged == number).sum():>12,} "
            f"{events.count('split'):>7,} {events.count('merge'):>7,}"
        )
    rows = kinds[:top]
    for row in rows:
        earlier, later = row["version"] - 1, row["version"]
        what = "became" if row["kind"] == "split" else "came from"
        at = earlier if row["kind"] == "split" else later
        say(f"{_name(found, at)}: feature {row['feature']} {what} {row['others']}")
    if len(kinds) > len(rows):
        say(f"… {len(kinds) - len(rows):,} more merges and splits; --events FILE has all")


def _name(found: Genealogy, number: int) -> str:
    return found.names[number] if number < len(found.names) else "the last"
