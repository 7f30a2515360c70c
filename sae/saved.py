"""An SAE's folder: config.json and weights.safetensors; tensors and JSON, no pickle."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae.base import SparseAutoencoder, kind_of
from sae.normaliser import Normaliser
from saescope.artefact import atomic_path, check_schema, read_json, write_json
from saescope.config import from_dict, to_dict
from saescope.errors import ArtefactError, InputError
from saescope.replacing import Kind, only_files
from saescope.system import system_errors

SCHEMA = 2
CONFIG_FILE = "config.json"
WEIGHTS_FILE = "weights.safetensors"
_OUTPUT = "output"


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
    normalisers = {"": sae.normaliser, **sae.site_normalisers}
    if sae.output_normaliser is not None:
        normalisers[_OUTPUT] = sae.output_normaliser
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
        write_json(temporary / CONFIG_FILE, described)


def read_sae(folder: Path, known: Mapping[str, type[SparseAutoencoder]]) -> SparseAutoencoder:
    """Load an SAE folder, given the known architectures.

    Raises ArtefactError if files are missing, damaged, or of a newer schema.
    """
    path = folder / CONFIG_FILE
    described = read_json(path)
    if not isinstance(described, dict) or described.get("kind") != "sae":
        raise ArtefactError("is not an SAE's configuration", where=str(path))
    check_schema(described.get("schema"), supported=SCHEMA, where=str(path))
    architecture = str(described.get("architecture"))
    if architecture not in known:
        raise ArtefactError(
            "unknown architecture", where=str(path), given=architecture, allowed=known
        )
    cls = known[architecture]
    try:
        config = from_dict(cls.Config, described["config"], where=str(path))
        sae = cls(config, described["d_in"], described.get("d_out"))
        tensors = load_file(folder / WEIGHTS_FILE)
        _take_normalisers(sae, described, tensors)
        sae.load_state_dict(tensors)
    except FileNotFoundError:
        raise ArtefactError("weights are missing", where=str(folder / WEIGHTS_FILE)) from None
    except KeyError as error:
        raise ArtefactError(f"incomplete SAE: {error} is missing", where=str(folder)) from None
    except Exception as error:
        if isinstance(error, InputError | ArtefactError):
            raise
        # safetensors and load_state_dict each have their own exceptions for a damaged file
        raise ArtefactError(f"damaged weights: {error}", where=str(folder)) from error
    sae.metadata = dict(described.get("metadata", {}))
    return sae.eval()


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
    sae.output_normaliser = found.pop(_OUTPUT, None)
    sae.site_normalisers = found


def _key(part: str, name: str) -> str:
    return f"normaliser.{part}@{name}" if name else f"normaliser.{part}"
