"""Fixtures of the C++ backend's tests."""

import pytest

from sae.kernels import cpp_backend


@pytest.fixture
def no_screen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests the plain product and what follows it, whatever the shape would choose."""
    monkeypatch.setenv("SAESCOPE_SCREEN", "none")


@pytest.fixture(params=["by row", "by tile"])
def sums(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to decode, whatever the shape would choose."""
    if request.param == "by tile":
        monkeypatch.setattr(cpp_backend, "_FEW", 0)
        monkeypatch.setattr(cpp_backend, "_IN_CACHE", -1)
    else:
        monkeypatch.setattr(cpp_backend, "_FEW", 2**40)
    return request.param
