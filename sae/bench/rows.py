"""Rows of results: what was timed, on what, with which versions."""

import csv
import io
import os
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from saescope import __version__
from saescope.artefact import append_bytes, git_commit
from saescope.errors import InputError
from saescope.system import read_whole, system_errors

COLUMNS: tuple[str, ...] = (
    "date",
    "kind",
    "name",
    "library",
    "version",
    "setting",
    "options",
    "data",
    "batch",
    "d_in",
    "d_sae",
    "k",
    "l0",
    "dead",
    "dtype",
    "device",
    "threads",
    "rounds",
    "median_s",
    "least_s",
    "cpu_s",
    "processor",
    "instructions",
    "torch",
    "python",
    "saescope",
    "commit",
)
"""kind: operation or step; name: the operation's, or the architecture's; l0: what was reached;
cpu_s: processor seconds (median); at threads * median_s the machine was this process' alone"""
_LARGEST = 256 << 20
_NARROW = "avx2"
_INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")


def facts(device: str) -> dict[str, Any]:
    """The columns that are the same for a whole run."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "processor": processor(),
        "instructions": instructions(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "saescope": __version__,
        "commit": git_commit() or "",
    }


def processor() -> str:
    """The processor's name, and how many of them there are."""
    return f"{_cpuinfo('model name') or platform.machine()} x{os.cpu_count()}"


def instructions() -> str:
    """The processor's vector instructions; apart from them those that torch is kept from.

    ATEN_CPU_CAPABILITY=avx2 does so, and SAESCOPE_CXXFLAGS=-march=x86-64-v3 for the C++: together
    they show what a processor without AVX-512 would do.
    """
    there = [name for name in _INSTRUCTIONS if name in _flags()]
    wide = [name for name in there if name != _NARROW]
    if not wide or torch.backends.cpu.get_cpu_capability() != _NARROW.upper():
        return " ".join(there)
    return f"{_NARROW}; {' '.join(wide)} not used"


def _flags() -> list[str]:
    return _cpuinfo("flags").split()


def _cpuinfo(name: str) -> str:
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == name:
                return value.strip()
    return ""


def read(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """The rows of a file; none if there is no file. InputError if it has other columns."""
    try:
        text = read_whole(path, largest=_LARGEST).decode()
        reader = csv.DictReader(io.StringIO(text, newline=""))
        found = tuple(reader.fieldnames or ())
    except FileNotFoundError:
        return []
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"is no file of results: {error}", where=str(path)) from None
    if found != tuple(columns):
        raise InputError(
            "holds other columns than these results have; choose another file",
            where=str(path),
            given=",".join(found)[:80],
        )
    return list(reader)


def append(path: Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] = COLUMNS) -> None:
    """Add rows to a file, which is made if it is not there.

    Raises InputError if the file has other columns.
    """
    new = not path.exists()
    read(path, columns)
    stream = io.StringIO(newline="")
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    if new:
        writer.writeheader()
    for row in rows:
        writer.writerow({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()})
    with system_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        append_bytes(path, stream.getvalue().encode())
