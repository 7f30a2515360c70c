"""Code that comes with a model is run only if the user trusts it explicitly.

A model's folder can bring code: classes that its config.json or tokenizer_config.json names
(auto_map), parts of a pipeline, a function for `generate`, or compiled kernels of the hub. Whoever
calls a library without an answer to "trust_remote_code" is asked for one on the terminal; so every
call here gives it. Weights in pickled files are read by a loader that builds tensors alone.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from activations.models.hf import quiet_transformers
from saescope.artefact import sha256_file, sha256_json
from saescope.errors import InputError, SaescopeError

_KERNELS = ("attn_implementation", "experts_implementation")
_PIPELINE = "model_index.json"


@contextmanager
def loading(spec: str, folder: Path, kind: str, *, trusted: bool) -> Iterator[None]:
    """Load a model's files within: libraries say less, and their errors become one of ours.

    Raises InputError if the folder's code would be needed and is not trusted, or for any other
    reason why it cannot be loaded as such a kind of model.
    """
    if not trusted:
        _refuse_what_libraries_do_not(spec, folder)
    with quiet_transformers():
        try:
            yield
        except (SaescopeError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # the loaders raise almost anything
            if not trusted and "trust_remote_code" in str(error):
                raise _needs_trust(spec, "it brings code of its own") from error
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise InputError(
                f"cannot be loaded as a {kind}: {reason[0][:300]}", where=spec
            ) from error


def _needs_trust(spec: str, what: str) -> InputError:
    return InputError(
        f"{what}, which is not run unless you say that you trust it: read it, then give "
        "--trust-remote-code (in Python trust_remote_code=True)",
        where=spec,
    )


def _refuse_what_libraries_do_not(spec: str, folder: Path) -> None:
    """Raise InputError for code that would be run though no trust is given."""
    kernels = [value for name, value in _entries(folder / "config.json") if name in _KERNELS]
    named = [each for value in kernels for each in _strings(value) if "/" in each]
    if named:
        raise _needs_trust(spec, f"its config.json names code of the hub, {named[0]!r}")
    if (folder / _PIPELINE).exists():
        # the parts of a pipeline are loaded by its library, which gives no answer for them
        for path in sorted(folder.glob("*/*.json")):
            if any(name == "auto_map" for name, _ in _entries(path)):
                raise _needs_trust(spec, f"its {path.parent.name} brings code of its own")


def _entries(path: Path) -> Iterator[tuple[str, Any]]:
    """Every name and value in a JSON file, at any depth; none if it is no such file."""
    try:
        waiting = [json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, RecursionError):
        return  # whoever loads it says what is wrong
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            yield from value.items()
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [text for each in value.values() for text in _strings(each)]
    return [value] if isinstance(value, str) else []


def hash_of_code(folder: Path) -> str:
    """sha256 over the code that a folder brings."""
    files = sorted(folder.rglob("*.py"))
    return sha256_json([[str(path.relative_to(folder)), sha256_file(path)] for path in files])
