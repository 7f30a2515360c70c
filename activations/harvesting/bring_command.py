"""`saescope harvest --from FILE`: import activations that were computed elsewhere."""

from dataclasses import dataclass

from activations.harvesting.bring import bring
from activations.storage.reader import ActivationStore
from activations.storage.row_files import open_rows, read_column
from activations.storage.row_formats import StorageKind
from saescope.config import Config
from saescope.errors import InputError, check_range


@dataclass(frozen=True, kw_only=True)
class BringCommand(Config):
    """Store activations that are in a file already."""

    rows_from: str
    """File with rows of activations: .npy, .safetensors, .parquet or .zarr (--from for short). Of
    all but .npy every array of rows is a site, and arrays called tokens, documents and keep are
    what the options below say."""

    out: str
    """Folder of the store, or a URL of one in an object store: s3://bucket/name."""

    sites: tuple[str, ...] = ()
    """Names of the arrays to take, all if none are given; of a .npy file, the name of its site."""

    tokens_from: str | None = None
    """.npy file of the rows' token ids, [row] or [sequence, position]."""

    documents_from: str | None = None
    """.npy file of numbers or names of documents, one a row (a sequence, if tokens have these);
    a document is wholly trained on or held out. Without it, blocks of `context` rows are."""

    keep_from: str | None = None
    """.npy file of truth values, as the tokens: which rows to store, where there are others."""

    model: str | None = None
    """Name of the model that the activations are of; needs tokens [sequence, position]."""

    context: int | None = None
    """Rows of a sequence; 128, or as the tokens are."""

    held_out_fraction: float = 0.05
    """Share of documents kept out of training, drawn by the seed."""

    storage: StorageKind | None = None
    """How rows are stored: bfloat16, float32 or int8; without it, so that each digit is kept."""

    chunk_rows: int = 16384
    """Rows of one chunk on disk."""

    window_chunks: int = 8
    """Chunks over which rows are shuffled, and that are committed together."""

    seed: int = 0
    """Decides the shuffling of rows and the documents held out."""

    def __post_init__(self) -> None:
        if not self.out:
            raise InputError("empty", where="out", given=self.out, allowed="a folder")
        check_range("held_out_fraction", self.held_out_fraction, low=0, below=1)
        for name in ("chunk_rows", "window_chunks"):
            check_range(name, getattr(self, name), low=1)


def run_bring(command: BringCommand) -> ActivationStore:
    """Bring a file's rows into a store. Errors as of `ActivationStore.from_arrays`."""
    found = open_rows(command.rows_from, command.sites)
    columns = dict(found.columns)
    for name in ("tokens", "documents", "keep"):
        path = getattr(command, f"{name}_from")
        if path is not None:
            if name in columns:
                raise InputError(
                    f"{command.rows_from} has {name} already", where=f"{name}_from", given=path
                )
            columns[name] = read_column(path, name)
    return bring(
        command.out,
        found.rows,
        **columns,
        model=command.model,
        context=command.context,
        held_out_fraction=command.held_out_fraction,
        storage=command.storage,
        chunk_rows=command.chunk_rows,
        window_chunks=command.window_chunks,
        seed=command.seed,
    )
