"""Where a model's files are: a package, a folder or the hub's cache; and their hash."""

from collections.abc import Iterable
from pathlib import Path

from activations.models.packaged import PACKAGED_MODELS, packaged_folder
from saescope.artefact import sha256_file, sha256_json
from saescope.errors import InputError

_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def folder_of(
    spec: str,
    revision: str | None,
    *,
    described_by: str = "config.json",
    hub_files: Iterable[str] = _HUB_FILES,
    nested: bool = False,
    with_code: bool = False,
) -> tuple[Path, str | None]:
    """The local folder of a model, fetched from the hub if it is a hub name; and its commit.

    `described_by` is the file that tells that a folder holds a model; `nested`: files in its
    folders are wanted as well; `with_code`: the code that it brings, too.

    Raises InputError if there is no such model.
    """
    if spec in PACKAGED_MODELS:
        return packaged_folder(spec), None
    local = Path(spec).expanduser()
    if local.is_dir():
        if not (local / described_by).exists():
            raise InputError(f"this folder holds no model: {described_by} is missing", where=spec)
        return local, None
    packaged = ", ".join(PACKAGED_MODELS)
    if spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise InputError(
            "no such model folder", where=spec, allowed=f"{packaged}, a folder, a hub name"
        )
    code = ["*.py"] if with_code else []
    return _fetch(spec, revision, packaged, [*hub_files, *code], nested)


def _fetch(
    spec: str, revision: str | None, packaged: str, files: list[str], nested: bool
) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    ignored = None if nested else ["*/*"]
    try:
        found = snapshot_download(
            spec, revision=revision, allow_patterns=files, ignore_patterns=ignored
        )
        if not nested and not any(Path(found).glob("*.safetensors")):
            # older models have nothing else; they are read as tensors alone
            snapshot_download(spec, revision=revision, allow_patterns=["pytorch_model*.bin"])
    except (HfHubHTTPError, HFValidationError, OSError, ValueError) as error:
        raise InputError(
            f"no such model: it is not packaged ({packaged} are), not a folder, and the hub gave "
            f"{type(error).__name__}. A hub name needs the network or the hub's local cache, and a "
            "gated model needs its licence accepted and HF_TOKEN set",
            where=spec,
        ) from error
    folder = Path(found)
    return folder, folder.name


def hash_of_weights(folder: Path) -> str:
    """sha256 over a folder's weight files, whatever precision they are loaded in."""
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return sha256_json([[file.name, sha256_file(file)] for file in files])
