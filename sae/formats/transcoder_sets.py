"""Sets of transcoders, one a layer: loaded together, in the order of their layers."""

from collections.abc import Sequence

from activations.sites.names import layer_of
from sae.core.base import SparseAutoencoder, kind_of
from sae.core.serialisation import CONFIG_FILE
from sae.formats.hub import SCHEME
from sae.formats.load import load
from saescope.artefact import MANIFEST
from saescope.errors import ArtefactError, InputError
from saescope.paths import AnyPath, as_path, file_sizes
from saescope.system import system_errors


@system_errors()
def load_transcoders(source: str | AnyPath | Sequence[str | AnyPath]) -> list[SparseAutoencoder]:
    """The transcoders of one model in the order of their layers, each as `sae.load` reads it.

    Args:
        source: folder of a sweep that trained one a layer, or of any runs or SAEs; or their paths.

    Each transcoder's `metadata` has the site that it reads ("site") and the one that it writes
    ("target_site"). A layer may be missing; users of the set that need all of them say so.

    Raises ArtefactError for a run that is not finished, or a folder without any; InputError for
    what is no transcoder, for two of one layer, or for transcoders of different models.

    >>> load_transcoders("runs/smollm2-135m-transcoders")[9].metadata["site"]  # doctest: +SKIP
    'blocks.9.ln2.hook_normalized'
    """
    if not isinstance(source, str) and isinstance(source, Sequence):
        paths = list(source)
    else:
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


def _members(folder: str | AnyPath) -> list[AnyPath]:
    """The runs and SAEs right in a folder, in the order of their names.

    Raises ArtefactError if there is none, InputError for a repository of the hub.
    """
    if str(folder).startswith(SCHEME):
        raise InputError(
            "of a repository on the hub, name the folder of each transcoder",
            where="load_transcoders",
            given=str(folder),
        )
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
