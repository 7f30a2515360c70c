"""Rows of several sites in the order stored, for measuring."""

from collections.abc import Iterator, Sequence

from jaxtyping import Float, Int64
from torch import Tensor

from activations.storage.reader import ActivationStore, Chunk
from saescope.errors import InputError
from saescope.integers import as_index


def checked_sites(store: ActivationStore, sites: str | Sequence[str]) -> tuple[str, ...]:
    """The names of some sites. Raises InputError unless each is stored and named once."""
    names = (sites,) if isinstance(sites, str) else tuple(sites)
    for name in names:
        store.d_in(name)
    if not names or len(set(names)) < len(names):
        raise InputError(
            "name at least one site, and each once",
            where="sites",
            given=names,
            allowed=store.sites,
        )
    return names


def aligned_rows(
    store: ActivationStore,
    sites: Sequence[str],
    *,
    split: str,
    limit: int | None = None,
    piece: int = 16384,
    spread: bool = False,
) -> Iterator[tuple[tuple[Float[Tensor, "rows d_in"], ...], Int64[Tensor, " rows"]]]:
    """Pieces of the rows of a split at several sites, unshuffled, each row once, in float32.

    A piece is a tensor [rows, d_in] a site, of the very same rows, and their row_token; it has at
    most `piece` rows, and does not run across the border of a chunk. With `limit`, that many rows:
    the first of the split, or (`spread`) an equal share of up to 16 chunks all over it. Rows are
    shuffled within a window when they are written, so such a share is a fair sample.

    Raises InputError for an unknown, repeated or missing site or an unknown split.

    >>> for (x,), row_token in aligned_rows(store, [site], split="held_out"):  # doctest: +SKIP
    ...     measure(x)
    """
    names = checked_sites(store, sites)
    piece = as_index(piece, where="piece", low=1)
    chunks, wanted = store.chunks(split), store.n_rows(split)
    if limit is not None:
        wanted = min(as_index(limit, where="limit", low=0), wanted)
    for chunk, rows in zip(chunks, _shares(chunks, wanted, spread), strict=True):
        if rows == 0:
            continue
        read = [store.read_chunk(name, chunk.index) for name in names]
        for start in range(0, rows, piece):
            part = slice(start, min(start + piece, rows))
            yield tuple(x[part].float() for x, _ in read), read[0][1][part]


def _shares(chunks: Sequence[Chunk], wanted: int, spread: bool) -> list[int]:
    """Rows to take of each chunk, `wanted` in all."""
    shares = [0] * len(chunks)
    rounds: list[tuple[Sequence[int], int]] = [(range(len(chunks)), wanted)]
    if spread and chunks:
        count = min(16, len(chunks))
        picked = [n * len(chunks) // count for n in range(count)]
        # the round behind makes up for chunks that are too short for their share
        rounds.insert(0, (picked, -(-wanted // count)))
    for numbers, most in rounds:
        for n in numbers:
            rows = min(wanted, most, chunks[n].rows - shares[n])
            shares[n] += rows
            wanted -= rows
    return shares
