"""`python -m benchmarks.suites`: what a process takes, and what is refused."""

import sys

import pytest

from benchmarks.suites import SuitesConfig, taken
from saescope.errors import ArtefactError, InputError


def test_what_a_process_takes() -> None:
    held = "x = b'x' * (1 << 30); import time; time.sleep(0.2)"
    found = taken([sys.executable, "-c", held], 1)
    assert 1024 <= found["mib"] < 1100
    assert found["wall_s"] >= 0.2
    assert 0 < found["cpu_s"] < found["wall_s"] + 0.2
    with pytest.raises(ArtefactError, match="failed: mine"):
        taken([sys.executable, "-c", "raise SystemExit('mine')"], 1)


def test_an_unknown_suite_is_refused() -> None:
    with pytest.raises(InputError, match="no such suite"):
        SuitesConfig(sae="x", suites=("core", "geometry,many"))
    SuitesConfig(sae="x", suites=("core", "geometry,probing"))
