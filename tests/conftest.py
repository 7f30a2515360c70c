"""The long tests run only when they are asked for by their mark: `-m slow`, `-m torture`, ..."""

import sys
from collections.abc import Iterator

import pytest

LONG = ("slow", "torture", "sweep")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.option.markexpr or ""
    left_out = [mark for mark in LONG if mark not in asked]
    long = {item for item in items if any(item.get_closest_marker(mark) for mark in left_out)}
    config.hook.pytest_deselected(items=[item for item in items if item in long])
    items[:] = [item for item in items if item not in long]


@pytest.fixture(autouse=True)
def _main_module() -> Iterator[None]:
    """Streamlit's AppTest leaves its script as the main module, which new processes would run."""
    main = sys.modules["__main__"]
    yield
    sys.modules["__main__"] = main


@pytest.fixture
def own_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test declares is not known to the next one; what this package declares always is,
    though a family that is imported meanwhile declares its rows but once."""
    from sae import evaluation
    from saescope import metrics

    monkeypatch.setattr(evaluation, "_REGISTRY", dict(evaluation.families()))
    monkeypatch.setattr(metrics, "_TABLE", dict(metrics._TABLE))
