"""`saescope export`: features of a store in the formats of other tools, and as HTML pages."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dashboards.feature_html import features_page, iframe, index_page, page_title
from saescope.artefact import MANIFEST, atomic_path, read_manifest, write_manifest
from saescope.config import Config, to_dict
from saescope.errors import InputError, check_range
from saescope.memory import cycles_later
from saescope.paths import AnyPath, as_path, if_local, local
from saescope.progress import Progress, say
from saescope.replacing import PLAIN_FILE, Kind, check_apart, check_replaceable
from saescope.system import system_errors
from store import Annotations, FeatureStore
from store.export.neuronpedia import LOCAL_CREATOR, write_neuronpedia
from store.export.parquet_store import PARQUET_STORE, write_parquet_store
from store.export.record import read_records
from store.export.saedashboard import write_saedashboard
from store.export.tables import FORMATS as TABLES
from store.export.tables import write_tables
from store.selection import choose_features

WHOLE = "parquet-store"
FORMATS = ("neuronpedia", "saedashboard", *TABLES, "html", WHOLE)
SCHEMA = 1
INDEX = "index.html"
_A_WEEK = 7 * 24 * 3600.0


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Config):
    """Export features of a store, or all of it."""

    store: str
    """A store's file or folder."""
    out: str
    """Folder to write; for HTML also a file NAME.html, one page for all the features; for a whole
    store also a URL (s3://bucket/name)."""
    format: str = "html"
    """neuronpedia (what its importer reads), saedashboard (its batch-N.json), csv, parquet,
    html (pages that open without a network), or parquet-store: the whole store as partitioned
    Parquet, which saescope opens as it does the store, from an object store too."""
    features: str | None = None
    """Numbers and ranges, as 3,17,100-120; without these and without a list, all live features."""
    list: str | None = None
    """A list of people's, as favourites, instead of numbers."""
    window: int = 16
    """Tokens on each side of an HTML page's examples; the other formats have whole sequences."""
    layer: int | None = None
    """Layer's number for Neuronpedia and SAEDashboard; the first number in the site's name if not
    given."""
    source_set: str | None = None
    """What Neuronpedia is to call the set of SAEs; the store's name if not given."""
    creator: str = LOCAL_CREATOR
    """Id of the account in Neuronpedia that the data is to belong to; that of an installation on
    one's own machine if not given."""
    replace: bool = False
    """Replace an export that is in `out`."""

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise InputError("no such format", where="format", given=self.format, allowed=FORMATS)
        check_range("window", self.window, low=0)
        if self.format == WHOLE and (self.features or self.list):
            raise InputError(
                f"a whole store is written with {WHOLE}; choose features with another format",
                where="features" if self.features else "list",
                given=self.features or self.list,
            )


def _is_export(folder: Path) -> bool:
    return bool(read_manifest(folder, kind="feature export", schema=SCHEMA))


EXPORT = Kind("an export of features", _is_export)


@system_errors()
def export(config: ExportConfig) -> AnyPath:
    """Write the export; the path of what was written.

    Raises InputError for a wrong choice of features, or if something is in the way; an interrupted
    export leaves nothing behind.
    """
    if config.format == WHOLE:
        return _whole_store(config)
    out = local(config.out)
    one_page = config.format == "html" and out.suffix == ".html"
    kind = PLAIN_FILE if one_page else EXPORT
    check_replaceable(out, kind, replace=config.replace)
    with FeatureStore.open(config.store) as store, _notes(store) as notes:
        check_apart(out, if_local(store.path))
        features = choose_features(store, notes, config.features, config.list)
        with (
            atomic_path(out, kind, replace=config.replace) as temporary,
            Progress("exporting", len(features), "features") as progress,
            cycles_later(),
        ):
            if not one_page:
                temporary.mkdir()
            for count in _written(temporary, config, store, notes, features, one_page):
                progress.advance(count)
            if not one_page:
                parent = str(store.meta.get("sae_hash") or "") or None
                settings = to_dict(config)
                write_manifest(
                    temporary, kind="feature export", schema=SCHEMA, config=settings, parent=parent
                )
    say(f"{out}: {len(features):,} features ({config.format})")
    if config.format == "html":
        name = out.name if one_page else f"{out.name}/{_page_name(features[0])}"
        say(f"to show it in another page: {iframe(name, name)}")
    return out


def _whole_store(config: ExportConfig) -> AnyPath:
    out = as_path(config.out)
    with FeatureStore.open(config.store, query_seconds=_A_WEEK) as store:
        if isinstance(out, Path):
            check_replaceable(out, PARQUET_STORE, replace=config.replace)
            path = if_local(store.path)
            check_apart(out, path.parent if path and path.name == MANIFEST else path)
        write_parquet_store(store, out, replace=config.replace)
    say(f"{out}: the whole store, in Parquet; open it as any store: saescope explore {out}")
    return out


def _notes(store: FeatureStore) -> Annotations:
    return Annotations.open(store.path, sae_hash=str(store.meta.get("sae_hash") or ""))


def _written(
    target: Path,
    config: ExportConfig,
    store: FeatureStore,
    notes: Annotations,
    features: Sequence[int],
    one_page: bool,
) -> Iterator[int]:
    if not features:
        raise InputError("no feature of this store ever fires", where=config.store)
    if config.format in TABLES:
        return write_tables(target, config.format, store, notes, features)
    if config.format == "html":
        return _pages(target, config, store, notes, features, one_page)
    names = {"layer": config.layer, "source_set": config.source_set}
    if config.format == "saedashboard":
        return write_saedashboard(target, store, notes, features, **names)
    return write_neuronpedia(target, store, notes, features, **names, creator=config.creator)


def _page_name(feature: int) -> str:
    return f"feature-{feature}.html"


def _pages(
    target: Path,
    config: ExportConfig,
    store: FeatureStore,
    notes: Annotations,
    features: Sequence[int],
    one_page: bool,
) -> Iterator[int]:
    """One page for all features, or one for each and an index."""
    overview, name = store.overview(), store.overview().name
    if one_page:
        records = []
        for record in read_records(store, notes, features, config.window):
            records.append(record)
            yield 1
        title = page_title(records[0], name) if len(records) == 1 else f"{name} · {_listed(config)}"
        target.write_text(features_page(records, overview, title), encoding="utf-8")
        return
    links: list[tuple[str, str]] = []
    for record in read_records(store, notes, features, config.window):
        file, title = _page_name(record.feature.feature), page_title(record, name)
        text = features_page([record], overview, title)
        (target / file).write_text(text, encoding="utf-8")
        links.append((file, title))
        yield 1
    (target / INDEX).write_text(index_page(links, name), encoding="utf-8")


def _listed(config: ExportConfig) -> str:
    return config.list or "features"
