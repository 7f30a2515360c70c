"""What every library is given: the same batches in the same order, and the same held-out rows."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from activations import ActivationLoader, ActivationStore
from sae.data.harvests import choose_site, held_out_rows, open_complete
from saescope.artefact import atomic_path, read_json, sha256_json, write_json
from saescope.errors import InputError
from saescope.progress import Progress
from saescope.system import system_errors


@dataclass(frozen=True)
class Data:
    """What every library is given: bits of bfloat16, and the moments of the training rows."""

    folder: Path
    name: str
    mean: list[float]
    mean_square: float

    @property
    def stream(self) -> NDArray[np.uint16]:
        """[steps, batch, d_in]"""
        return np.load(self.folder / "stream.npy", mmap_mode="r")

    @property
    def held_out(self) -> NDArray[np.uint16]:
        """[rows, d_in]"""
        return np.load(self.folder / "held_out.npy", mmap_mode="r")

    def held_out_rows(self, limit: int | None = None) -> Iterator[Tensor]:
        """Held-out rows, some at a time, float32."""
        stored = self.held_out[:limit]
        for start in range(0, len(stored), 4096):
            yield floats(stored[start : start + 4096])


def floats(bits: NDArray[np.uint16]) -> Tensor:
    """Float32 activations of stored bfloat16 bits."""
    return torch.from_numpy(np.array(bits).view(np.int16)).view(torch.bfloat16).float()


def export(
    work: Path, *, harvest: str, site: str | None, batch_size: int, seed: int, steps: int | None
) -> Data:
    """Write a harvest's batches (one pass if steps is None) and held-out rows, unless done before.

    Raises InputError if the harvest is not finished, or shorter than the steps asked for.
    """
    store = open_complete(harvest)
    site = choose_site(store, site)
    loader = ActivationLoader(
        store, site, batch_size=batch_size, seed=seed, epochs=1, order="chunks"
    )
    steps = steps or loader.batches_per_epoch
    if steps > loader.batches_per_epoch:
        raise InputError(
            "more steps than one pass has", where="steps", given=steps,
            allowed=f"1 to {loader.batches_per_epoch}",
        )  # fmt: skip
    name = sha256_json([store.hash, site, batch_size, seed, steps])[:12]
    folder = work / "data" / name
    if not (folder / "data.json").exists():
        with system_errors(str(folder)), atomic_path(folder) as temporary:
            temporary.mkdir()
            _write(temporary, store, site, islice(loader, steps), (steps, batch_size))
    return open_data(folder)


def _write(
    folder: Path,
    store: ActivationStore,
    site: str,
    batches: Iterable[Any],
    shape: tuple[int, int],
) -> None:
    path = folder / "stream.npy"
    whole = (*shape, store.d_in(site))
    stream = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint16, shape=whole)
    with Progress("writing batches", shape[0], "batches") as progress:
        for number, x in enumerate(batches):
            stream[number] = _bits(x)
            progress.advance()
    stream.flush()
    held_out = [_bits(x) for x in held_out_rows(store, site, None)()]
    np.save(folder / "held_out.npy", np.concatenate(held_out))
    statistics = store.statistics(site)
    moments = {"mean": statistics.mean.tolist(), "mean_square": statistics.mean_square}
    write_json(folder / "data.json", moments)


def _bits(x: Tensor) -> NDArray[np.uint16]:
    return x.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def open_data(folder: Path) -> Data:
    """Exported activations."""
    moments = read_json(folder / "data.json")
    return Data(folder, folder.name, moments["mean"], moments["mean_square"])
