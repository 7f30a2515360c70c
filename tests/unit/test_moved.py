"""Old names of modules."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from saescope.moved import MOVED

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("old", sorted(MOVED))
def test_an_old_name_is_taken_and_todays_modules_exist(old: str) -> None:
    assert all(importlib.util.find_spec(module) is not None for module in MOVED[old])
    parent, _, name = old.rpartition(".")
    folder = ROOT / parent.replace(".", "/")
    assert not (folder / f"{name}.py").exists(), "a module of this name is there again"
    assert not (folder / name / "__init__.py").exists()


def test_an_old_name_gives_the_module_of_today() -> None:
    code = """
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    import sae.normaliser
    from activations.loader import ActivationLoader, aligned_rows
    from activations.models import load_model
    import dashboards.live as live
    from sae.steering import splice
import dashboards.model_cache, sae.core.normaliser, activations
assert sae.normaliser is sae.core.normaliser
assert sae.core.normaliser.__name__ == "sae.core.normaliser"
assert sae.core.normaliser.__spec__.name == "sae.core.normaliser"
assert live is dashboards.model_cache
assert ActivationLoader is activations.ActivationLoader
assert load_model is activations.load_model
assert splice is sae.splice
for each in said:
    print(each.category.__name__, each.message)
try:
    from activations.loader import nothing
except ImportError as error:
    print(error)
"""
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    lines = found.stdout.splitlines()
    assert "DeprecationWarning sae.normaliser is now sae.core.normaliser" in lines
    assert (
        "DeprecationWarning activations.loader is now activations.loading.loader and "
        "activations.loading.unshuffled"
    ) in lines
    assert "cannot import name 'nothing' from 'activations.loader'" in lines[-1]
