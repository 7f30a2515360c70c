"""Checkpoints: all that a run needs to continue with the same bits; tensors and JSON, no pickle.

state.json carries its own sha256, and the checksums of the tensors' files.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from saescope.artefact import atomic_path, check_seal, read_json
from saescope.errors import ArtefactError
from saescope.replacing import Kind, only_files
from saescope.seals import FILES, FileSeal, check_files, seals_of, write_sealed
from saescope.system import system_errors

SCHEMA = 2
SEALED_SINCE = 2
STATE = "state.json"
TENSORS = "tensors.safetensors"


def _is_checkpoint(folder: Path) -> bool:
    shards = [path.name for path in folder.glob("features-*.safetensors")]
    return only_files(folder, (TENSORS, STATE), shards)


KIND = Kind("a checkpoint", _is_checkpoint)


def optimiser_tensors(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state as named tensors, "<parameter>.<name>"."""
    state = optimiser.state_dict()["state"]
    return {
        f"{parameter}.{name}": torch.as_tensor(value)
        for parameter, entries in state.items()
        for name, value in entries.items()
    }


def restore_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what `optimiser_tensors` gave, each tensor in the precision that it was saved in.

    torch's own load_state_dict would bring counters and sums to their parameter's precision.
    """
    parameters = [each for group in optimiser.param_groups for each in group["params"]]
    optimiser.state.clear()
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        optimiser.state[parameter][name] = value.to(parameter.device, copy=True)


def save(folder: Path, *, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """Write a checkpoint (groups of named tensors, and JSON-able state), replacing the one there.

    Raises ArtefactError if the disk is full; the previous checkpoint is then still there.
    """
    with system_errors(str(folder)), atomic_path(folder, KIND, replace=True) as temporary:
        temporary.mkdir()
        write(temporary, flatten(tensors), state)


def flatten(groups: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    """Tensors by "<group>/<name>"."""
    return {
        f"{group}/{name}": value.detach().contiguous()
        for group, members in groups.items()
        for name, value in members.items()
    }


def write(
    folder: Path,
    flat: dict[str, Tensor],
    state: dict[str, Any],
    others: Mapping[str, FileSeal] | None = None,
) -> None:
    """Write the files of a checkpoint into an existing folder.

    Args: others are checksums of files that are there already, to be recorded with these.
    """
    save_file(flat, folder / TENSORS)
    files = {**seals_of(folder, [TENSORS]), **(others or {})}
    write_sealed(folder / STATE, {"schema": SCHEMA, **state, FILES: files})


def state_of(folder: Path) -> dict[str, Any]:
    """What state.json says; ArtefactError if it is damaged or of another schema."""
    path = folder / STATE
    state = read_json(path)
    schema = state.get("schema") if isinstance(state, dict) else None
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise ArtefactError(
            "checkpoint of another version",
            where=str(path),
            given=schema,
            allowed=f"1 to {SCHEMA}",
        )
    check_seal(state, must=schema >= SEALED_SINCE, where=str(path))
    return state


def check(folder: Path, state: dict[str, Any], names: Iterable[str]) -> None:
    """Raise DamagedError unless these files are those that the checkpoint was written with."""
    if state["schema"] >= SEALED_SINCE:
        check_files(folder, state, names, "checkpoint")


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read a checkpoint; ArtefactError if it is damaged or of another schema."""
    state = state_of(folder)
    check(folder, state, [TENSORS])
    try:
        flat = load_file(folder / TENSORS)
    except (OSError, SafetensorError) as error:
        raise ArtefactError(f"damaged checkpoint: {error}", where=str(folder)) from error
    groups: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        group, _, name = key.partition("/")
        groups.setdefault(group, {})[name] = value
    return groups, state
