"""Rows of a harvest that stores none, computed by the model when they are read.

Such a harvest has its text alone. Its windows are computed by the model as a harvest computes
them, and their rows dealt over the same chunks, so that readers get what a harvest with the same
settings has on disk, bit for bit on the same machine.
"""

from dataclasses import replace
from functools import cached_property
from typing import Any

from numpy.typing import NDArray

from activations.models.base import HarvestModel
from activations.recompute.window import config_of, group_of, model_of, recompute
from activations.storage.reader import ActivationStore
from activations.storage.window_data import WindowData, dealt
from saescope.errors import InputError
from saescope.progress import Progress, silent


class ComputedRows:
    """The chunks of a harvest without activations.

    The last window read of each split is kept, so chunks are best read a window at a time; held-out
    rows stay at hand while a training split is gone through. All sites are computed at once, on the
    device of the harvest.
    """

    def __init__(self, store: ActivationStore) -> None:
        self._store = store
        # rows are read as a harvest to bfloat16 has them
        self._config = replace(config_of(store), storage="bfloat16")
        self._chunk_rows = int(store.manifest["chunk_rows"])
        self._kept: dict[str, tuple[int, WindowData]] = {}

    @cached_property
    def _model(self) -> HarvestModel:
        return model_of(self._store)

    @cached_property
    def _window_of_chunk(self) -> dict[int, int]:
        return {
            chunk.index: number
            for number, window in enumerate(self._store.windows)
            for chunk in window.chunks(self._chunk_rows)
        }

    def chunk(self, site: str, chunk: int) -> NDArray[Any]:
        """The bits of bfloat16 [row, d_in] of a committed chunk, filled up where its rows end.

        Raises InputError for a site that was not asked for in the harvest, or if the model is not
        the one of the harvest; DamagedError if its tokens are damaged.
        """
        if site not in self._store.sites:
            raise InputError(
                "this harvest has no such site",
                where=str(self._store.path),
                given=site,
                allowed=self._store.sites,
            )
        number = self._window_of_chunk[chunk]
        return dealt(
            self._window(number), self._store.windows[number], site, chunk, self._chunk_rows
        )

    def _window(self, number: int) -> WindowData:
        split = self._store.windows[number].split
        if split in self._kept and self._kept[split][0] == number:
            return self._kept[split][1]
        self._kept.pop(split, None)  # its memory is for the next one
        with silent(), Progress(f"window {number}", 0, "tokens") as progress:
            data = recompute(
                self._store,
                number,
                group_of(self._store, number),
                self._model,
                self._store.sites,
                self._config,
                progress,
            )
        self._kept[split] = number, data
        return data
