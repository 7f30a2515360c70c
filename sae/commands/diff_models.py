"""`saescope diff-models`: which features of a crosscoder over two models only one of them has."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pyarrow import parquet
from torch import Tensor

from activations import ActivationStore
from sae.analysis.model_diff import CLASSES, ModelDiff, Thresholds, diff_models
from sae.architectures.crosscoder import Crosscoder
from sae.commands.tables import SUFFIXES, write_table
from sae.core.base import SparseAutoencoder, kind_of
from sae.data.harvests import open_harvest, read_chunk
from sae.data.placement import Placement
from sae.data.provenance import weights_hash
from sae.formats.load import SAE_FOLDER, load
from saescope.artefact import write_bytes
from saescope.config import Config
from saescope.errors import ArtefactError, InputError, check_range
from saescope.paths import local
from saescope.progress import Progress, say
from saescope.replacing import check_replaceable
from saescope.system import system_errors

MODEL_DIFF = "model_diff.parquet"
"""what the explorer reads, in the folder of a run"""
_FACTS = b"saescope"
_MEANINGS = {
    "only_a": "only A has it",
    "only_b": "only B has it",
    "shared": "written to both alike",
    "not_only_a": "written to A alone, though B has it too",
    "not_only_b": "written to B alone, though A has it too",
    "other": "between these",
    "silent": "fires on too few rows to tell",
}


@dataclass(frozen=True, kw_only=True)
class DiffModelsConfig(Config):
    """Find the features of a crosscoder over two models that only one of them has."""

    run: str
    """Folder of a crosscoder's run, of two sites: model A's and model B's."""
    harvest: str | None = None
    """Harvest of both models; the one that it was trained on if not given."""
    rows: int = 65_536
    """Rows to look at, held-out ones first."""
    least_norm_difference: float = Thresholds.least_norm_difference
    """From which difference of decoder norms on (0 to 1; 1 is written to B alone) a feature may be
    of B alone; of A alone, up to 1 minus it."""
    most_error: float = Thresholds.most_error
    """Most of a feature of one model alone that may be in the other's reconstruction error, over
    what is in its own."""
    most_reconstruction: float = Thresholds.most_reconstruction
    """The same of the reconstructions."""
    least_rows: int = Thresholds.least_rows
    """A feature that fires on fewer rows is not told."""
    top: int = 10
    """How many features of each model alone to print."""
    out: str | None = None
    """File to write all features to: .parquet or .csv. They are also in model_diff.parquet in the
    run's folder, where the explorer finds them."""

    def __post_init__(self) -> None:
        check_range("rows", self.rows, low=1)
        check_range("top", self.top, low=0)
        if self.out is not None and not self.out.endswith(SUFFIXES):
            raise InputError("no kind of table", where="out", given=self.out, allowed=SUFFIXES)
        self.thresholds  # noqa: B018  checks them

    @property
    def thresholds(self) -> Thresholds:
        """From where on a feature counts as of one model alone."""
        return Thresholds(
            least_norm_difference=self.least_norm_difference,
            most_error=self.most_error,
            most_reconstruction=self.most_reconstruction,
            least_rows=self.least_rows,
        )


def run(config: DiffModelsConfig) -> pa.Table:
    """Print and write what each feature of a crosscoder is to its two models; the table.

    Raises InputError if it is no crosscoder over two models, or a file is at `out` already;
    ArtefactError if something cannot be read.
    """
    if config.out is not None:
        check_replaceable(local(config.out), None, replace=False)
    sae = load(config.run)
    if not isinstance(sae, Crosscoder):
        raise InputError(
            "is no crosscoder, which reads two models at once",
            where=config.run,
            given=kind_of(sae.config),
            allowed="crosscoder",
        )
    harvest, placement = open_harvest(sae, config.harvest)
    found = diff_models(sae, _rows(harvest, placement, config.rows))
    table = as_table(found, sae, config.thresholds)
    _print(config, found, table)
    folder = local(config.run)
    if (folder / SAE_FOLDER).is_dir():
        with system_errors(str(folder)):
            write_bytes(folder / MODEL_DIFF, _as_parquet(table))
        say(f"{folder / MODEL_DIFF}: {len(table):,} features")
    if config.out is not None:
        write_table(table, local(config.out))
        say(f"{config.out}: {len(table):,} features")
    return table


def _rows(harvest: ActivationStore, placement: Placement, rows: int) -> Iterator[Tensor]:
    chunks = [*harvest.chunks("held_out"), *harvest.chunks("train")]
    left = min(rows, sum(chunk.rows for chunk in chunks))
    with Progress("encoding", left, "rows") as progress:
        for chunk in chunks:
            if left <= 0:
                return
            x, _ = read_chunk(harvest, placement.read, chunk)
            yield x[:left]
            progress.advance(min(len(x), left))
            left -= len(x)


def as_table(found: ModelDiff, sae: SparseAutoencoder, thresholds: Thresholds) -> pa.Table:
    """A row a feature; how it was made is in the table's metadata (`facts_of`)."""
    columns: dict[str, Any] = {
        "feature": torch.arange(len(found.counts)).numpy(),
        "class": found.classes(thresholds),
        "rows": found.counts.numpy(),
    }
    for name in (
        "norm_difference",
        "error_ratio",
        "reconstruction_ratio",
        "error_ratio_of_a",
        "reconstruction_ratio_of_a",
    ):
        columns[name] = getattr(found, name).float().numpy()
    facts = {
        "sites": sae.metadata["sites"],
        "rows": found.rows,
        "thresholds": asdict(thresholds),
        "sae_hash": weights_hash(sae),
    }
    return pa.table(columns).replace_schema_metadata({_FACTS: json.dumps(facts)})


def facts_of(table: pa.Table) -> dict[str, Any]:
    """How a table was made: sites of A and B, rows, thresholds, sae_hash. KeyError without."""
    return json.loads((table.schema.metadata or {})[_FACTS])


def read_model_diff(run: Path) -> pa.Table:
    """What `saescope diff-models` wrote into a run's folder.

    Raises ArtefactError if it is missing or damaged.
    """
    path = run / MODEL_DIFF
    try:
        table = parquet.read_table(path)
        facts_of(table)
    except FileNotFoundError:
        raise ArtefactError(
            "there is none; `saescope diff-models RUN` writes it", where=str(path)
        ) from None
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise ArtefactError(f"damaged table: {error}", where=str(path)) from error
    return table


def _as_parquet(table: pa.Table) -> bytes:
    stream = BytesIO()
    parquet.write_table(table, stream)
    return stream.getvalue()


def meaning(name: str) -> str:
    """What a class of features is, in words."""
    return _MEANINGS[name]


def _print(config: DiffModelsConfig, found: ModelDiff, table: pa.Table) -> None:
    a, b = facts_of(table)["sites"]
    say(f"A is {a}, B is {b}; {found.rows:,} rows")
    frame = table.to_pandas()
    for name in CLASSES:
        say(f"{(frame['class'] == name).sum():>8,}  {name}: {meaning(name)}")
    shared = frame[frame["class"] == "shared"]
    if len(shared):
        say(
            "for comparison: of the shared features the median error ratio is "
            f"{shared['error_ratio'].median():.2f}, of the reconstructions "
            f"{shared['reconstruction_ratio'].median():.2f}"
        )
    for name, suffix in (("only_a", "_of_a"), ("only_b", "")):
        some = frame[frame["class"] == name].sort_values("rows", ascending=False)
        if not len(some) or not config.top:
            continue
        say(f"{name:>8} {'rows':>8} {'norms':>7} {'error':>7} {'reconstruction':>15}")
        for row in some.head(config.top).to_dict("records"):
            say(
                f"{row['feature']:>8} {row['rows']:>8,} {row['norm_difference']:>7.3f} "
                f"{row[f'error_ratio{suffix}']:>7.3f} "
                f"{row[f'reconstruction_ratio{suffix}']:>15.3f}"
            )
