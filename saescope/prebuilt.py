"""Libraries that a wheel carries, compiled for kinds of processors.

They lie in the folder `prebuilt` beside their sources, as NAME-VARIANT-SOURCES-CHECKSUM.so: the
hash of the sources that they were made of, and the checksum of the file. One made of other sources,
or damaged, is never loaded. Like `compiler` it needs Python's own modules alone.
"""

import functools
import platform
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from saescope import compiler
from saescope.compiler import NotBuilt

FOLDER = "prebuilt"
_V3 = frozenset(["avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe"])
_V4 = _V3 | frozenset(["avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"])


class Variant(NamedTuple):
    """A kind of processor that libraries are compiled for."""

    name: str
    system: str
    """as `platform` calls it, as the machine"""
    machine: str
    flags: tuple[str, ...]
    needs: frozenset[str] = frozenset()
    """features of the processor, as Linux calls them"""


VARIANTS = (
    Variant(
        "x86_64_v4_vnni",
        "Linux",
        "x86_64",
        ("-march=x86-64-v4", "-mavx512vnni"),
        _V4 | {"avx512_vnni"},
    ),
    Variant("x86_64_v3", "Linux", "x86_64", ("-march=x86-64-v3",), _V3),
    Variant("aarch64", "Linux", "aarch64", ("-march=armv8-a",)),
    Variant("macos_arm64", "Darwin", "arm64", ("-mcpu=apple-m1",)),
)
"""the best of a machine first"""


def variants() -> list[Variant]:
    """Those of this machine's kind, whether or not this processor has what they need."""
    here = (platform.system(), platform.machine())
    return [each for each in VARIANTS if (each.system, each.machine) == here]


@functools.cache
def features() -> frozenset[str]:
    """What this processor has, as Linux tells it; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return frozenset()
    lines = path.read_text(encoding="utf-8").splitlines()
    flags = [line.partition(":")[2] for line in lines if line.startswith(("flags", "Features"))]
    return frozenset(flags[0].split()) if flags else frozenset()


def find(name: str, folder: Path) -> Path | None:
    """The best library for this processor beside these sources; None if none was shipped.

    Raises NotBuilt where some were, and none can be used.
    """
    shipped = list((folder / FOLDER).glob(f"{name}-*.so"))
    if not shipped:
        return None
    sources = compiler.digest(folder)
    for variant in variants():
        for path in shipped:
            if not path.name.startswith(f"{name}-{variant.name}-{sources}-"):
                continue
            if not variant.needs <= features():
                continue
            if path.name == _file_name(name, variant, sources, path):
                return path
            said = "is damaged and is not used; installing saescope anew mends it"
            print(f"saescope: {path} {said}", file=sys.stderr)  # noqa: T201
    kinds = ", ".join(sorted({path.name.split("-")[1] for path in shipped}))
    raise NotBuilt(f"of those prebuilt ({kinds}) none is of these sources and for this processor")


def build(name: str, folder: Path, target: Path, *, threads: bool = False) -> list[Path]:
    """Compile a folder's sources for each variant of this machine, into the folder `target`.

    Args:
        threads: whether the sources work on several.

    A variant that the compiler does not know is left out, with a line on standard error. Returns
    the libraries' paths. Raises NotBuilt without a compiler.
    """
    command, built = compiler.find(), []
    own = compiler.thread_flags(compiler.version(command)) if threads else ()
    for variant in variants():
        with tempfile.TemporaryDirectory() as temporary:
            library = Path(temporary) / "library.so"
            try:
                compiler.compile_folder(
                    [*command, *compiler.FLAGS, *variant.flags, *own], folder, library, command
                )
            except NotBuilt as error:
                print(f"saescope: no {name} for {variant.name}: {error}", file=sys.stderr)  # noqa: T201
                continue
            target.mkdir(parents=True, exist_ok=True)
            file = _file_name(name, variant, compiler.digest(folder), library)
            (target / file).write_bytes(library.read_bytes())
            built.append(target / file)
    return built


def _file_name(name: str, variant: Variant, sources: str, library: Path) -> str:
    return f"{name}-{variant.name}-{sources}-{compiler.checksum(library)}.so"
