"""Runs the C++ code's tests under the address and undefined-behaviour sanitizers.

`make check-native` runs it: once for this processor and, on x86-64, once more without the vectors
of newer ones, which is other code. It fails at the first error; without a compiler it says so.
"""

import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

_TESTS = (
    *(f"kernels/test_{name}.py" for name in ("cpu", "cpu_gradients", "screen", "adam")),
    "unit/test_gather.py",
)
_FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all"
_RUNTIMES = ("libasan.so", "libubsan.so")
_LOADED = (
    "from sae.kernels import cpp_library; from activations.loading import gather; "
    "raise SystemExit(cpp_library.library() is None or gather.library() is None)"
)


def main() -> int:
    """Exit status: 0 if all is well or there is no compiler."""
    root = Path(__file__).parents[2]
    compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
    if shutil.which(compiler[0]) is None:
        print(f"skipped: there is no {compiler[0]}")  # noqa: T201
        return 0
    runtimes = [_found(compiler, name) for name in _RUNTIMES]
    if None in runtimes:
        print(f"skipped: {compiler[0]} has no sanitizers")  # noqa: T201
        return 0
    targets = ["native", *(["x86-64"] if platform.machine() == "x86_64" else [])]
    for target in targets:
        environment = {
            **os.environ,
            "CXX": shlex.join(compiler),
            "SAESCOPE_CXXFLAGS": f"-march={target} {_FLAGS}",
            "SAESCOPE_CACHE": str(root / "build" / "sanitized"),
            "SAESCOPE_KERNELS": "",
            # ahead of everything: Python itself is not built with them, and torch leaks on purpose
            "LD_PRELOAD": " ".join(filter(None, runtimes)),
            "ASAN_OPTIONS": "detect_leaks=0",
        }
        print(f"-march={target}", flush=True)  # noqa: T201
        tests = [f"tests/{name}" for name in _TESTS]
        pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout=1200", *tests]
        for arguments in (["-c", _LOADED], pytest):
            status = subprocess.run([sys.executable, *arguments], cwd=root, env=environment)
            if status.returncode:
                return status.returncode
    return 0


def _found(compiler: list[str], runtime: str) -> str | None:
    """Path of a compiler's library, if it has that."""
    done = subprocess.run(
        [*compiler, f"-print-file-name={runtime}"], capture_output=True, text=True
    )
    path = Path(done.stdout.strip())
    return str(path) if path.is_absolute() else None


if __name__ == "__main__":
    raise SystemExit(main())
