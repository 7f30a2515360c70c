"""Sets of transcoders, one a layer: loaded in the order of their layers, and written.

A set is the folder of a sweep, or one in circuit-tracer's layout, here or on the hub.
"""

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import parse_qs, urlparse

from activations.sites.names import layer_of
from sae.core.base import SparseAutoencoder, kind_of
from sae.core.serialisation import CONFIG_FILE
from sae.formats._given import Given
from sae.formats._yaml import read_yaml
from sae.formats.circuit_tracer import (
    CONFIG,
    HOOKS,
    SET,
    is_set,
    read_transcoder,
    write_set,
)
from sae.formats.hub import SCHEME, HubFolder, fetched
from sae.formats.load import load, named_sites
from saescope.artefact import MANIFEST
from saescope.errors import ArtefactError, InputError
from saescope.paths import AnyPath, as_path, file_sizes, local
from saescope.replacing import Kind, check_replaceable, only_files
from saescope.system import system_errors


@system_errors()
def load_transcoders(source: str | AnyPath | Sequence[str | AnyPath]) -> list[SparseAutoencoder]:
    """The transcoders of one model in the order of their layers, each as `sae.load` reads it.

    Args:
        source: folder of a sweep that trained one a layer, or of any runs or SAEs; or their paths;
            or a set in circuit-tracer's layout (`sae/formats/circuit_tracer.py`), in a folder or
            on the hub, hf://owner/repo[/folder][@revision].

    Each transcoder's `metadata` has the site that it reads ("site") and the one that it writes
    ("target_site"). A layer may be missing; users of the set that need all of them say so.

    Raises ArtefactError for a run that is not finished, or a folder without any; InputError for
    what is no transcoder, for two of one layer, or for transcoders of different models.

    >>> load_transcoders("runs/smollm2-135m-transcoders")[9].metadata["site"]  # doctest: +SKIP
    'blocks.9.ln2.hook_normalized'
    >>> load_transcoders("hf://mntss/transcoder-Llama-3.2-1B")  # doctest: +SKIP
    """
    if not isinstance(source, str) and isinstance(source, Sequence):
        paths = list(source)
    else:
        released = _released(source)
        if released is not None:
            return _read_released(released)
        paths = _members(source)
    if not paths:
        raise InputError("wants at least one transcoder", where="load_transcoders", given="none")
    found: dict[int, SparseAutoencoder] = {}
    origin: dict[int, str] = {}
    for path in paths:
        sae = load(path)
        layer = layer_of_transcoder(sae, str(path))
        if layer in found:
            raise InputError(
                "two transcoders of one layer",
                where=str(path),
                given=f"layer {layer}",
                allowed=f"one; {origin[layer]} is of it too",
            )
        found[layer], origin[layer] = sae, str(path)
    _check_one_model(found, origin)
    return [found[layer] for layer in sorted(found)]


@system_errors()
def write_transcoders(
    transcoders: Sequence[SparseAutoencoder], folder: str | Path, *, replace: bool = False
) -> None:
    """Write transcoders, one of every layer, in circuit-tracer's layout, atomically.

    Its `model_name` is that of the transcoders' model. With `replace` a set that is there is
    replaced; InputError for anything else that is, for a layer that is missing, for different
    activation functions, and for what the layout cannot hold.
    """
    if not transcoders:
        raise InputError("wants at least one transcoder", where="write_transcoders", given="none")
    for number, sae in enumerate(transcoders):
        found = layer_of_transcoder(sae, f"write_transcoders, number {number}")
        if found != number:
            raise InputError(
                "circuit-tracer needs a transcoder of every layer, in their order",
                where="write_transcoders",
                given=f"layer {found}",
                allowed=f"layer {number}",
            )
    out = local(str(folder))
    check_replaceable(out, EXPORT, replace=replace)
    write_set(transcoders, out, EXPORT if replace else None)


def layer_of_transcoder(sae: SparseAutoencoder, where: str) -> int:
    """The block whose output a transcoder writes.

    Raises InputError for what is no transcoder of one site, or does not say where it belongs.
    """
    if not sae.transcodes or sae.concatenates:
        raise InputError(
            "is no transcoder of one layer",
            where=where,
            given=kind_of(sae.config),
            allowed=("transcoder", "skip_transcoder"),
        )
    sites = {name: sae.metadata.get(name) for name in ("site", "target_site")}
    layers = {None if site is None else layer_of(str(site)) for site in sites.values()}
    if None in layers or len(layers) != 1:
        raise InputError(
            "a transcoder of a set reads and writes sites of one block",
            where=where,
            given=sites,
        )
    return next(layer for layer in layers if layer is not None)


def _is_export(folder: Path) -> bool:
    return only_files(folder, (CONFIG, "layer_*.safetensors"))


EXPORT = Kind("a set of transcoders", _is_export)


def _released(source: str | AnyPath) -> Path | None:
    """The local folder of a set in circuit-tracer's layout; None for another folder.

    Raises ArtefactError for a repository of the hub that cannot be fetched.
    """
    if str(source).startswith(SCHEME):
        return fetched(HubFolder.parse(str(source)), (CONFIG, "layer_*.safetensors"))[0]
    here = as_path(source)
    return here if isinstance(here, Path) and is_set(here) else None


def _read_released(folder: Path) -> list[SparseAutoencoder]:
    given = read_yaml(folder / CONFIG)
    if given.get("model_kind") != SET:
        raise InputError(
            "is no set of transcoders (sae.load reads a cross-layer transcoder)",
            where=given.where,
            given=given.get("model_kind"),
            allowed=SET,
        )
    if "transcoders" in given:
        files = given["transcoders"]
        if not isinstance(files, list) or not all(isinstance(each, str) for each in files):
            raise ArtefactError("transcoders is no list of files", where=given.where)
        return [_read_listed(name, n, folder, given) for n, name in enumerate(files)]
    numbers = sorted(
        int(path.stem.removeprefix("layer_"))
        for path in folder.glob("layer_*.safetensors")
        if path.stem.removeprefix("layer_").isdecimal()
    )
    if not numbers or numbers != list(range(len(numbers))):
        raise ArtefactError(
            "layers are missing from this set", where=str(folder), given=f"layers {numbers}"
        )
    return [
        read_transcoder(folder / f"layer_{layer}.safetensors", layer, given).eval()
        for layer in numbers
    ]


def _read_listed(name: str, layer: int, folder: Path, given: Given) -> SparseAutoencoder:
    """A transcoder that a set's configuration names, a file here or hf://owner/repo/file."""
    path, where = folder / name, name
    if name.startswith(SCHEME):
        parsed = urlparse(name)
        revision = parse_qs(parsed.query).get("revision", [None])[0]
        where, _, file = f"{SCHEME}{parsed.netloc}{parsed.path}".rpartition("/")
        where = f"{where}@{revision}" if revision else where
        if not file.endswith(".npz"):
            path = fetched(HubFolder.parse(where), (file,))[0] / file
    if not name.partition("?")[0].endswith(".npz"):
        return read_transcoder(path, layer, given).eval()
    # Gemma Scope's own files
    sae = load(where if name.startswith(SCHEME) else path.parent)
    return named_sites(sae, *(f"blocks.{layer}.{given.text(hook)}" for hook in HOOKS))


def _members(folder: str | AnyPath) -> list[AnyPath]:
    """The runs and SAEs right in a folder, in the order of their names.

    Raises ArtefactError if there is none.
    """
    here = as_path(folder)
    inside = {tuple(name.split("/")) for name in file_sizes(here)}
    named = (MANIFEST, CONFIG_FILE)
    found = sorted({first for first, *rest in inside if len(rest) == 1 and rest[0] in named})
    if not found:
        raise ArtefactError("no runs and no SAEs are in this folder", where=str(here))
    return [here / name for name in found]


def _check_one_model(found: dict[int, SparseAutoencoder], origin: dict[int, str]) -> None:
    for fact in ("model", "weights_hash"):
        known = {
            layer: sae.metadata[fact] for layer, sae in found.items() if sae.metadata.get(fact)
        }
        if len(set(known.values())) > 1:
            first = next(iter(known))
            other = next(layer for layer in known if known[layer] != known[first])
            raise InputError(
                f"transcoders of different models ({fact})",
                where=origin[other],
                given=known[other],
                allowed=f"{known[first]}, of {origin[first]}",
            )
