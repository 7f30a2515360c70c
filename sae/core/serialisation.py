"""An SAE's folder: config.json and weights.safetensors; tensors and JSON, no pickle.

config.json carries its own sha256, and the checksum of the weights.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.core.normaliser import Normaliser
from saescope.artefact import DamagedError, atomic_path, check_schema, check_seal, read_json
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


@dataclass(frozen=True, kw_only=True)
class SavedSAE:
    """What an SAE's folder holds."""

    architecture: str
    """kind of the SAE, a name in the registry of architectures"""
    config: dict[str, Any]
    """its configuration's fields"""
    d_in: int
    d_out: int
    tensors: dict[str, Tensor]
    """parameters and buffers"""
    normalisers: dict[str, Normaliser]
    """"" is the input's, "output" the output's, others a site's"""
    metadata: dict[str, Any]
    defined_in: str | None = None
    """module of the architecture, of one that does not come with saescope"""

    def check_sizes(self, d_sae: int, folder: Path) -> None:
        """Raise ArtefactError unless some tensor has each of the sizes that config.json states.

        To be called before anything of these sizes is made.
        """
        found = [*self.tensors.values(), *(each.mean for each in self.normalisers.values())]
        sizes = {size for tensor in found for size in tensor.shape}
        for name, size in {"d_in": self.d_in, "d_sae": d_sae, "d_out": self.d_out}.items():
            if type(size) is not int or size not in sizes:
                raise ArtefactError(
                    f"{name} is not that of the weights",
                    where=str(folder / CONFIG_FILE),
                    given=size,
                )

    def check_types(self, wanted: Mapping[str, Tensor], folder: Path) -> None:
        """Raise ArtefactError for a tensor that would lose precision where it is loaded to.

        Integers stay what they are, floats may be shorter.
        """
        for name, own in wanted.items():
            found = self.tensors[name].dtype if name in self.tensors else own.dtype
            shorter = own.is_floating_point() and found.is_floating_point
            if found != own.dtype and not (shorter and found.itemsize <= own.dtype.itemsize):
                raise ArtefactError(
                    f"{name} is of another type",
                    where=str(folder / WEIGHTS_FILE),
                    given=str(found),
                    allowed=f"{own.dtype}" + (" or shorter" if own.is_floating_point() else ""),
                )


def write_saved(
    saved: SavedSAE,
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
    tensors = {name: value.detach().contiguous() for name, value in saved.tensors.items()}
    for name, each in saved.normalisers.items():
        # cloned: one normaliser may stand for several sites, and safetensors shares no memory
        tensors[_key("mean", name)] = each.mean.clone()
        tensors[_key("scale", name)] = each.scale.clone()
    described = {
        "kind": "sae",
        "schema": SCHEMA,
        "architecture": saved.architecture,
        **({} if saved.defined_in is None else {"defined_in": saved.defined_in}),
        "d_in": saved.d_in,
        "d_out": saved.d_out,
        "config": saved.config,
        "normalisers": {
            name: {"kind": each.kind, "variance": each.variance}
            for name, each in saved.normalisers.items()
        },
        "metadata": saved.metadata,
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


def read_saved(folder: Path) -> SavedSAE:
    """What an SAE's folder holds.

    Raises ArtefactError if files are missing, damaged, or of a newer schema.
    """
    described = described_sae(folder)
    with damage_named(folder):
        tensors = load_file(folder / WEIGHTS_FILE)
        normalisers = _take_normalisers(described, tensors)
        d_in, d_out = described["d_in"], described.get("d_out")
        return SavedSAE(
            architecture=str(described.get("architecture")),
            defined_in=described.get("defined_in"),
            config=described["config"],
            d_in=d_in,
            d_out=d_in if d_out is None else d_out,
            tensors=tensors,
            normalisers=normalisers,
            metadata=dict(described.get("metadata", {})),
        )


@contextmanager
def damage_named(folder: Path) -> Iterator[None]:
    """Whatever fails inside, because a folder's files do not fit together, is an ArtefactError."""
    try:
        yield
    except KeyError as error:
        raise ArtefactError(f"incomplete SAE: {error} is missing", where=str(folder)) from None
    except Exception as error:
        if isinstance(error, InputError | ArtefactError):
            raise
        # safetensors and load_state_dict each have their own exceptions for a damaged file
        raise ArtefactError(f"damaged weights: {error}", where=str(folder)) from error


def _take_normalisers(
    described: dict[str, Any], tensors: dict[str, Tensor]
) -> dict[str, Normaliser]:
    """The normalisers by name; their tensors are taken out of `tensors`."""
    if described["schema"] == 1:  # one normaliser, its scale in the JSON
        stored = described["normaliser"]
        tensors["normaliser.scale"] = torch.tensor(stored["scale"], dtype=torch.float32)
        described = {"normalisers": {"": stored}}
    found = {}
    for name, stored in described["normalisers"].items():
        mean, scale = (tensors.pop(_key(what, name)) for what in ("mean", "scale"))
        found[name] = Normaliser(stored["kind"], mean, scale, stored["variance"])
    return found


def _key(what: str, name: str) -> str:
    return f"normaliser.{what}@{name}" if name else f"normaliser.{what}"
