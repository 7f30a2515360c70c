"""An SAE's folder: config.json and weights.safetensors; tensors and JSON, no pickle.

config.json carries its own sha256, and the checksum of the weights.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.core.base import SparseAutoencoder, kind_of
from sae.core.normaliser import Normaliser
from sae.core.soundness import normalisers_of
from saescope.artefact import DamagedError, atomic_path, check_schema, check_seal, read_json
from saescope.config import from_dict, to_dict
from saescope.errors import ArtefactError, InputError
from saescope.replacing import Kind, only_files
from saescope.seals import FILES, check_files, seals_of, write_sealed
from saescope.system import system_errors

SCHEMA = 3
SEALED_SINCE = 3
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "weights.safetensors"


def _is_sae(folder: Path) -> bool:
    files = (CONFIG_FILE, WEIGHTS_FILE)
    return only_files(folder, files) and read_json(folder / CONFIG_FILE).get("kind") == "sae"


KIND = Kind("an SAE", _is_sae)


def write_sae(
    sae: SparseAutoencoder,
    folder: Path,
    more: Mapping[str, Any],
    save: Callable[[dict[str, Tensor], Path], None] = save_file,
    *,
    replace: bool = False,
) -> None:
    """Write an SAE's folder, atomically; `more` is put into config.json.

    Args: save writes the tensors into a file (of an SAE whose features several processes share,
    all of them). With `replace` an SAE that is there is replaced, never anything else.
    """
    tensors = {name: value.detach().contiguous() for name, value in sae.state_dict().items()}
    normalisers = normalisers_of(sae)
    for name, each in normalisers.items():
        # cloned: one normaliser may stand for several sites, and safetensors shares no memory
        tensors[_key("mean", name)] = each.mean.clone()
        tensors[_key("scale", name)] = each.scale.clone()
    described = {
        "kind": "sae",
        "schema": SCHEMA,
        "architecture": kind_of(sae.config),
        "d_in": sae.d_in,
        "d_out": sae.d_out,
        "config": to_dict(sae.config),
        "normalisers": {
            name: {"kind": each.kind, "variance": each.variance}
            for name, each in normalisers.items()
        },
        "metadata": sae.metadata,
        **more,
    }
    with system_errors(folder), atomic_path(folder, KIND, replace=replace) as temporary:
        temporary.mkdir()
        save(tensors, temporary / WEIGHTS_FILE)
        described[FILES] = seals_of(temporary, [WEIGHTS_FILE])
        write_sealed(temporary / CONFIG_FILE, described)


def described_sae(folder: Path) -> dict[str, Any]:
    """What config.json says, once it and the weights beside it are found to be those written.

    Raises ArtefactError (DamagedError for what was damaged) otherwise.
    """
    path = folder / CONFIG_FILE
    described = read_json(path)
    if not isinstance(described, dict):
        raise ArtefactError("is not an SAE's configuration", where=str(path))
    if described.get("kind") != "sae":
        check_seal(described, must=False, where=str(path))
        raise ArtefactError("is not an SAE's configuration", where=str(path))
    check_schema(described.get("schema"), supported=SCHEMA, where=str(path))
    sealed = described["schema"] >= SEALED_SINCE
    check_seal(described, must=sealed, where=str(path))
    if sealed:
        check_files(folder, described, [WEIGHTS_FILE], "weights")
    elif not (folder / WEIGHTS_FILE).is_file():
        raise DamagedError(
            "damaged weights: the file is missing", where=str(folder / WEIGHTS_FILE), kind="missing"
        )
    return described


def read_sae(folder: Path, known: Mapping[str, type[SparseAutoencoder]]) -> SparseAutoencoder:
    """Load an SAE folder, given the known architectures.

    Raises ArtefactError if files are missing, damaged, or of a newer schema.
    """
    described = described_sae(folder)
    path = folder / CONFIG_FILE
    architecture = str(described.get("architecture"))
    if architecture not in known:
        raise ArtefactError(
            "unknown architecture", where=str(path), given=architecture, allowed=known
        )
    cls = known[architecture]
    try:
        config = from_dict(cls.Config, described["config"], where=str(path))
        _check_sizes(folder, described, config.d_sae)
        sae = cls(config, described["d_in"], described.get("d_out"))
        tensors = load_file(folder / WEIGHTS_FILE)
        _take_normalisers(sae, described, tensors)
        _check_types(sae, tensors, folder)
        sae.load_state_dict(tensors)
        sae.metadata = dict(described.get("metadata", {}))
    except KeyError as error:
        raise ArtefactError(f"incomplete SAE: {error} is missing", where=str(folder)) from None
    except Exception as error:
        if isinstance(error, InputError | ArtefactError):
            raise
        # safetensors and load_state_dict each have their own exceptions for a damaged file
        raise ArtefactError(f"damaged weights: {error}", where=str(folder)) from error
    return sae.eval()


def _check_sizes(folder: Path, described: Mapping[str, Any], d_sae: int) -> None:
    """Before anything of these sizes is made: they are those of the tensors in the file."""
    with safe_open(folder / WEIGHTS_FILE, "pt") as file:
        sizes = {size for name in file.keys() for size in file.get_slice(name).get_shape()}  # noqa: SIM118
    wanted = {"d_in": described["d_in"], "d_sae": d_sae}
    if described.get("d_out") is not None:
        wanted["d_out"] = described["d_out"]
    for name, size in wanted.items():
        if type(size) is not int or size not in sizes:
            raise ArtefactError(
                f"{name} is not that of the weights", where=str(folder / CONFIG_FILE), given=size
            )


def _check_types(sae: SparseAutoencoder, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Nothing loses precision on the way: integers stay what they are, floats may be shorter."""
    for name, own in sae.state_dict().items():
        found = tensors[name].dtype if name in tensors else own.dtype
        shorter = own.is_floating_point() and found.is_floating_point
        if found != own.dtype and not (shorter and found.itemsize <= own.dtype.itemsize):
            raise ArtefactError(
                f"{name} is of another type",
                where=str(folder / WEIGHTS_FILE),
                given=str(found),
                allowed=f"{own.dtype}" + (" or shorter" if own.is_floating_point() else ""),
            )


def _take_normalisers(
    sae: SparseAutoencoder, described: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    if described["schema"] == 1:  # one normaliser, its scale in the JSON
        stored = described["normaliser"]
        tensors["normaliser.scale"] = torch.tensor(stored["scale"], dtype=torch.float32)
        described = {"normalisers": {"": stored}}
    found = {}
    for name, stored in described["normalisers"].items():
        mean, scale = (tensors.pop(_key(part, name)) for part in ("mean", "scale"))
        found[name] = Normaliser(stored["kind"], mean, scale, stored["variance"])
    sae.normaliser = found.pop("")
    sae.output_normaliser = found.pop("output", None)
    sae.site_normalisers = found


def _key(part: str, name: str) -> str:
    return f"normaliser.{part}@{name}" if name else f"normaliser.{part}"
