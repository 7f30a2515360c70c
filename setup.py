"""What pyproject.toml cannot say: a wheel carries the compiled C++ (`saescope.prebuilt`).

Libraries are called with ctypes and link neither Python nor torch, so a wheel is for any Python 3
on its platform. Without a compiler it carries none and is for any platform; the C++ is then
compiled where it is used.
"""

import sys
from pathlib import Path
from typing import ClassVar

from setuptools import setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

sys.path.insert(0, str(Path(__file__).parent))  # setuptools does not put it there
from saescope import prebuilt
from saescope.compiler import NotBuilt

# name, folder, whether it works on several threads
LIBRARIES = (
    ("kernels", "sae/kernels", True),
    ("gather", "activations/loading", False),
    ("counting", "store", False),
)


class BuildWithLibraries(build_py):
    """Adds the libraries to what is built; not for an editable install, whose sources change."""

    built: ClassVar[list[Path]] = []

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        try:
            for name, folder, threads in LIBRARIES:
                target = Path(self.build_lib, folder, prebuilt.FOLDER)
                made = prebuilt.build(name, Path(folder), target, threads=threads)
                self.built.extend(made)
        except NotBuilt as error:
            print(f"saescope: without prebuilt libraries: {error}", file=sys.stderr)  # noqa: T201


class PlatformWheel(bdist_wheel):
    """Named for its platform, but for no Python, where it has libraries."""

    def run_command(self, command: str) -> None:
        super().run_command(command)
        if command == "build" and BuildWithLibraries.built:  # the first of what `run` runs
            self.root_is_pure = False
            self.distribution.has_ext_modules = lambda: True  # install beside one another

    def get_tag(self) -> tuple[str, str, str]:
        python, abi, platform = super().get_tag()
        return (python, abi, platform) if self.root_is_pure else ("py3", "none", platform)


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": PlatformWheel})
