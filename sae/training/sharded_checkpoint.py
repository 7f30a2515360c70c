"""Checkpoints and released SAEs of a dictionary whose features are shared out among ranks.

A checkpoint then has a file of each rank's rows beside what all ranks hold alike, and is committed
as one. It can be read by any number of ranks, one included, and so can one that a single process
wrote. A released SAE is one ordinary file, into which rank after rank sends its rows.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sae import distributed
from sae.core.base import SparseAutoencoder
from sae.core.serialisation import write_saved
from sae.distributed import FEATURES
from sae.training import checkpoint, process_group
from saescope.artefact import atomic_path, fsync_path
from saescope.errors import ArtefactError
from saescope.seals import FileSeal, seal_of
from saescope.system import system_errors

Splits = Callable[[str, Tensor], bool]
"""whether a tensor, by its name, has one row a feature"""
_PIECE_BYTES = 2**26
"""sent at a time"""
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""names that safetensors has for types"""


def _file(rank: int) -> str:
    return f"features-{rank}.safetensors"


def has_rows(sae: SparseAutoencoder) -> Splits:
    """Whether a parameter or buffer, by its name, has a row for each of the features."""
    return lambda name, value: name in sae.by_feature and value.ndim > 0


def splits_of(sae: SparseAutoencoder) -> Splits:
    """Whether a tensor of a checkpoint, "<group>/<name>", has a row for each of the features."""
    parameters = [name for name, _ in sae.named_parameters()]
    of_optimiser = {str(n) for n, name in enumerate(parameters) if name in sae.by_feature}

    def splits(flat: str, value: Tensor) -> bool:
        group, _, name = flat.partition("/")
        if group == "optimiser":
            return name.partition(".")[0] in of_optimiser and value.ndim > 0
        return has_rows(sae)(name, value) if group == "sae" else name == "tokens_since_fired"

    return splits


def save(
    folder: Path,
    sae: SparseAutoencoder,
    *,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
) -> None:
    """Write a run's checkpoint, replacing the one there, once all ranks have written their rows.

    Raises ArtefactError if a disk is full, on all ranks; the previous checkpoint is then there.
    """
    if FEATURES.size == 1:
        if process_group.first():
            checkpoint.save(folder, tensors=tensors, state=state)
        return
    flat, splits = checkpoint.flatten(tensors), splits_of(sae)
    own = {name: value for name, value in flat.items() if splits(name, value)}
    alike = {name: value for name, value in flat.items() if name not in own}

    if process_group.first():
        with atomic_path(folder, checkpoint.KIND, replace=True) as temporary:
            temporary.mkdir()
            seals = _write_rows(folder, Path(distributed.broadcast(str(temporary))), own)
            all_alike = {**state, "shards": FEATURES.size}

            def finish() -> None:
                with system_errors(str(folder)):
                    checkpoint.write(temporary, alike, all_alike, seals)

            process_group.together(finish)
    else:
        _write_rows(folder, Path(distributed.broadcast(None)), own)
        process_group.together(lambda: None)
    distributed.everyones(None)  # nobody goes on before the checkpoint is there


def _write_rows(folder: Path, temporary: Path, own: dict[str, Tensor]) -> dict[str, FileSeal]:
    """Write the file of this rank's rows of a checkpoint; the seals of all ranks' files."""
    path, found = temporary / _file(FEATURES.rank), {}

    def write() -> None:
        with system_errors(str(folder)):
            save_file(own, path)
            fsync_path(path)
            found[path.name] = seal_of(path)

    process_group.together(write)
    return {name: seal for each in distributed.everyones(found) for name, seal in each.items()}


def load(
    folder: Path, sae: SparseAutoencoder
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """What `save` was given; of a dictionary's rows those that this rank has now."""
    groups, state = checkpoint.load(folder)
    shards = state.pop("shards", None)
    if shards is not None:
        # each rank looks at some of the files; who finds one damaged ends all
        names = [_file(n) for n in range(int(shards)) if n % FEATURES.size == FEATURES.rank]
        checkpoint.check(folder, state, names)
        for flat, value in _read_rows(folder, int(shards)).items():
            group, _, name = flat.partition("/")
            groups.setdefault(group, {})[name] = value
    elif FEATURES.size > 1:
        splits = splits_of(sae)
        for group, members in groups.items():
            for name, value in members.items():
                if splits(f"{group}/{name}", value):
                    members[name] = value[FEATURES.share(len(value))].clone()
    return groups, state


def own_rows(tensors: Mapping[str, Tensor], splits: Splits) -> dict[str, Tensor]:
    """Of a whole dictionary's tensors, this rank's rows."""
    return {
        name: value[FEATURES.share(len(value))].clone() if splits(name, value) else value
        for name, value in tensors.items()
    }


def _read_rows(folder: Path, shards: int) -> dict[str, Tensor]:
    """This rank's rows of a checkpoint that `shards` ranks wrote.

    Raises ArtefactError if a file is missing or damaged.
    """
    try:
        files = [safe_open(folder / _file(rank), "pt") for rank in range(shards)]
        return {name: _rows_of(name, files) for name in files[0].keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"damaged checkpoint: {error}", where=str(folder)) from error


def _rows_of(name: str, files: list[Any]) -> Tensor:
    slices = [file.get_slice(name) for file in files]
    lengths = [each.get_shape()[0] for each in slices]
    own, pieces, first = FEATURES.share(sum(lengths)), [], 0
    for each, length in zip(slices, lengths, strict=True):
        start, stop = max(own.start - first, 0), min(own.stop - first, length)
        if start < stop:
            pieces.append(each[start:stop])
        first += length
    return torch.cat(pieces) if pieces else slices[0][:0]


# ---- one file of all rows -----------------------------------------------------------------------


def save_whole(tensors: Mapping[str, Tensor], path: Path | None, splits: Splits) -> None:
    """Write one safetensors file of all ranks' rows; every rank calls it, the first has a path.

    No rank holds more of the others' rows than a piece.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].dtype.itemsize, name))
    split = [name for name in names if splits(name, tensors[name])]
    lengths = distributed.everyones({name: len(tensors[name]) for name in split})
    if path is None:
        for name in split:
            for piece in _pieces(tensors[name]):
                dist.send(piece.cpu(), dst=0)
        return
    with path.open("wb") as stream:
        shapes = {name: list(tensors[name].shape) for name in names}
        for name in split:
            shapes[name][0] = sum(each[name] for each in lengths)
        _write_header(stream, {name: (tensors[name].dtype, shapes[name]) for name in names})
        for name in names:
            for piece in _pieces(tensors[name]):
                stream.write(_bytes(piece))
            for rank in range(1, len(lengths) if name in split else 1):
                like = tensors[name]
                for rows in _row_counts(lengths[rank][name], like):
                    piece = torch.empty(rows, *like.shape[1:], dtype=like.dtype)
                    dist.recv(piece, src=rank)
                    stream.write(_bytes(piece))


def release(sae: SparseAutoencoder, folder: Path, *, replace: bool = False) -> None:
    """Write an SAE's folder, ordinary and whole, whoever has its features.

    With `replace` an SAE that is there is replaced, never anything else.
    """

    splits = has_rows(sae)
    if FEATURES.size == 1:
        if process_group.first():
            sae.save(folder, replace=replace)
    elif process_group.first():

        def save(tensors: dict[str, Tensor], path: Path) -> None:
            save_whole(tensors, path, splits)

        write_saved(sae.saved(), folder, {}, save=save, replace=replace)
    else:
        save_whole(sae.state_dict(), None, splits)


def _write_header(
    stream: BinaryIO, members: Mapping[str, tuple[torch.dtype, Sequence[int]]]
) -> None:
    """What a safetensors file begins with: the length of a JSON table, and the table."""
    table, end = {}, 0
    for name, (dtype, shape) in members.items():
        start, end = end, end + dtype.itemsize * math.prod(shape)
        table[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)


def _row_counts(rows: int, like: Tensor) -> list[int]:
    """How `rows` rows like those of a tensor are sent: so many at a time."""
    row = max(1, math.prod(like.shape[1:])) * like.dtype.itemsize
    size = max(1, _PIECE_BYTES // row)
    return [min(size, rows - start) for start in range(0, rows, size)]


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    rows = tensor.detach().contiguous() if tensor.ndim else tensor.detach().reshape(1)
    return iter(rows.split(_row_counts(len(rows), rows))) if len(rows) else iter(())


def _bytes(piece: Tensor) -> bytes:
    return piece.cpu().contiguous().view(torch.uint8).numpy().tobytes()
