"""The packages' public names: each is what it says, whatever was imported before it."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

import sae


def test_every_public_name_is_there() -> None:
    assert set(sae.__all__) <= set(dir(sae))
    for name in sae.__all__:
        assert getattr(sae, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'sae' has no attribute 'trian'"):
        sae.trian  # type: ignore[attr-defined]  # noqa: B018


def test_no_public_name_is_that_of_a_module() -> None:
    # whichever was imported last would win
    modules = {found.name for found in pkgutil.iter_modules(sae.__path__)}
    assert not modules & set(sae.__all__)


def test_architectures_are_listed_before_and_after_an_sae_is_loaded() -> None:
    code = (
        "import sae\n"
        "before = sae.list_architectures()\n"
        "sae.load, sae.train\n"
        "assert sae.list_architectures() == before and 'topk' in before\n"
        "assert sae.architectures.__name__ == 'sae.architectures'\n"
        "from sae import *\n"
        "assert steer is sae.steer\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_nothing_heavy_is_imported_with_the_package() -> None:
    code = "import sae, sys; sys.exit(sum(name in sys.modules for name in ('torch', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.parametrize("package", ["activations", "sae", "store"])
def test_all_public_names_can_be_imported_by_name(package: str) -> None:
    module = importlib.import_module(package)
    for name in module.__all__:
        assert not isinstance(getattr(module, name), type(sys)), name
