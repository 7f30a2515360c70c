"""Encoding a harvest in pieces, which several processes share and a killed one goes on from.

Rank 0 holds the store's lock. Each rank takes the next piece that nobody has, encodes it and
commits it (`sae.indexing.pending`); when all are there rank 0 alone makes the store of them. To
have a piece is to hold a lock on a byte of a file beside the store, as in a harvest
(`activations.harvesting.window_locks`).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from activations import ActivationStore
from activations.harvesting.window_locks import Team, member, pauses, ranks_file
from activations.storage.reader import Chunk
from sae.data.harvests import read_chunk
from sae.indexing.ends import Indexed
from sae.indexing.pending import Arrays, Pending, pending_folder
from saescope.artefact import parents_of
from saescope.locks import locked
from saescope.process_rank import this_rank
from saescope.progress import Progress

_PIECE_ROWS = 16384
"""rows of a piece, at least; what is lost when a process is killed"""
_NAME = "activations"


@dataclass(frozen=True)
class Piece:
    """Some consecutive chunks of a harvest, encoded and committed together."""

    number: int
    chunks: Sequence[Chunk]

    @property
    def rows(self) -> int:
        """Its rows."""
        return sum(chunk.rows for chunk in self.chunks)


def pieces_of(harvest: ActivationStore, first_chunk: int = 0) -> list[Piece]:
    """The pieces of a harvest, from a chunk on."""
    both = (*harvest.chunks("train"), *harvest.chunks("held_out"))
    pieces: list[Piece] = []
    chunks: list[Chunk] = []
    rows = 0
    for chunk in sorted((c for c in both if c.index >= first_chunk), key=lambda c: c.index):
        chunks.append(chunk)
        rows += chunk.rows
        if rows >= _PIECE_ROWS:
            pieces.append(Piece(len(pieces), chunks))
            chunks, rows = [], 0
    return [*pieces, Piece(len(pieces), chunks)] if chunks else pieces


@contextmanager
def at_work(store: Path) -> Iterator[Team]:
    """Take part in building a store, as rank 0 (which holds its lock) or as another.

    A folder that was made for it is removed if nothing is in it at the end. Raises ArtefactError if
    others are at work there, or the file system has no locks.
    """
    first = this_rank().number == 0
    with (
        parents_of(store),
        locked(store, "index") if first else nullcontext(),
        member(store, "an index") as team,
    ):
        yield team


def left_behind(store: Path) -> bool:
    """Whether a build of this store is at work, or was killed."""
    lock = store.with_name(f".{store.name}.lock")
    return any(each.exists() for each in (pending_folder(store), lock, ranks_file(store)))


@dataclass(frozen=True)
class Encoder:
    """An SAE that encodes pieces of a harvest, and where they are kept."""

    sae: Indexed
    read: Sequence[str]
    harvest: ActivationStore
    pieces: Sequence[Piece]
    pending: Pending

    def run(self, team: Team) -> None:
        """Encode what is missing, until all is committed by this or other ranks.

        For another rank than 0 also until rank 0 has finished; ArtefactError if it is gone.
        """
        missing = {p.number: p for p in self.pieces if not self.pending.has(_NAME, p.number)}
        total = sum(piece.rows for piece in self.pieces)
        done = total - sum(piece.rows for piece in missing.values())
        waits = pauses()
        with torch.inference_mode(), Progress("encoding", total, "tokens", done) as progress:
            while missing:
                before = len(missing)
                for piece in list(missing.values()):
                    if self._is_done(piece, team):
                        del missing[piece.number]
                        progress.advance(piece.rows)
                if len(missing) == before:
                    if team.number and not self.pending.is_open():
                        return
                    team.check()
                    next(waits)

    def _is_done(self, piece: Piece, team: Team) -> bool:
        """Whether a piece is committed, now if no other rank has it."""
        if self.pending.has(_NAME, piece.number):
            return True
        if not team.claim(piece.number):
            return False
        try:
            if not self.pending.has(_NAME, piece.number) and self.pending.is_open():
                self.pending.put(_NAME, piece.number, self._encode(piece))
        finally:
            team.release(piece.number)
        return True

    def _encode(self, piece: Piece) -> Arrays:
        """The activations of a piece: of each row its token and their number, then all in turn."""
        row_tokens, counts, index, value = [], [], [], []
        for chunk in piece.chunks:
            x, row_token = read_chunk(self.harvest, self.read, chunk)
            codes = self.sae.encode_sparse(x).compact()
            row_tokens.append(row_token.numpy())
            counts.append(codes.row_ptr.diff().to(torch.int32).numpy())
            index.append(codes.index.to(torch.int32).numpy())
            value.append(codes.value.float().numpy())
        names = ("row_token", "count", "feature", "activation")
        several = (row_tokens, counts, index, value)
        return {name: np.concatenate(each) for name, each in zip(names, several, strict=True)}

    def activations(self) -> Iterator[Arrays]:
        """Positions, features and activations [n each] of all pieces, one after another.

        One that was damaged on the disk meanwhile is encoded again.
        """
        total = sum(piece.rows for piece in self.pieces)
        with Progress("reading what was encoded", total, "tokens") as progress:
            for piece in self.pieces:
                found = self.pending.get(_NAME, piece.number) or self._encode(piece)
                yield {
                    "position": np.repeat(found["row_token"], found["count"]),
                    "feature": found["feature"],
                    "activation": found["activation"],
                }
                progress.advance(piece.rows)
