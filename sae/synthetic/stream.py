"""A world's rows as a trainer reads them: an endless stream with an exact state, held-out rows."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from sae.core.batch import RawBatch
from sae.synthetic.drawing import Drawing, DrawnRows
from sae.synthetic.world import World
from saescope.artefact import sha256_json
from saescope.config import to_dict
from saescope.errors import InputError, check_range
from saescope.integers import as_index

_TRAINING, _HELD_OUT, _SCORED = range(3)
_PIECE = 4096
"""held-out rows drawn together"""


class SyntheticStream:
    """Batches [batch_size, d_in] of a world's rows, without end and none twice.

    The rows are those of Drawing in order, whatever the batch size.

    >>> from sae.synthetic.config import world_config
    >>> stream = SyntheticStream(World(world_config("tiny")), batch_size=64)
    world: 100 steps
    world: done, 100 steps in ...
    >>> batches = iter(stream)
    >>> next(batches).x.shape, stream.state_dict()["row"]
    (torch.Size([64, 32]), 64)
    """

    def __init__(
        self,
        world: World,
        *,
        batch_size: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        check_range("batch_size", batch_size, low=1)
        self.world, self.batch_size, self.seed = world, batch_size, seed
        self._device = torch.device(device)
        self._training = self._drawing(_TRAINING)
        self._next = 0

    def __iter__(self) -> Iterator[RawBatch]:
        while True:
            first, self._next = self._next, self._next + self.batch_size
            yield RawBatch(self._training.rows(first, self.batch_size))

    def first_rows(self, rows: int) -> Tensor:
        """The first training rows [rows, d_in]; where the stream stands does not change."""
        return self._training.rows(0, rows)

    def held_out(self, rows: int) -> Callable[[], Iterator[RawBatch]]:
        """Fresh iterators over so many rows that are never trained on, always the same."""
        drawing = self._drawing(_HELD_OUT)

        def batches() -> Iterator[RawBatch]:
            for first in range(0, rows, _PIECE):
                yield RawBatch(drawing.rows(first, min(_PIECE, rows - first)))

        return batches

    def scored(self, rows: int, *, piece: int = _PIECE) -> Iterator[DrawnRows]:
        """So many further rows with their true features, to score an SAE on; always the same."""
        drawing = self._drawing(_SCORED)
        for first in range(0, rows, piece):
            yield drawing.with_codes(first, min(piece, rows - first))

    def state_dict(self) -> dict[str, Any]:
        """Which rows these are, and which comes next; JSON-able."""
        return {**self._identity(), "row": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with the row at which the state was taken; InputError for one of other rows."""
        for name, value in self._identity().items():
            if state.get(name) != value:
                raise InputError(
                    f"the state of another stream: {name} differs",
                    where="load_state_dict",
                    given=state.get(name),
                    allowed=str(value),
                )
        self._next = as_index(state.get("row"), where="load_state_dict.row", low=0)

    def _identity(self) -> dict[str, Any]:
        return {"world": world_hash(self.world), "seed": self.seed}

    def _drawing(self, purpose: int) -> Drawing:
        return Drawing(self.world, seed=self.seed, purpose=purpose, device=self._device)


def world_hash(world: World) -> str:
    """What identifies a world: the hash of its configuration."""
    return sha256_json(to_dict(world.config))
