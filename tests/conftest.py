"""The long tests run only when they are asked for by their mark: `-m slow`, `-m torture`, ..."""

import pytest

LONG = ("slow", "torture", "sweep")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.option.markexpr or ""
    left_out = [mark for mark in LONG if mark not in asked]
    long = {item for item in items if any(item.get_closest_marker(mark) for mark in left_out)}
    config.hook.pytest_deselected(items=[item for item in items if item in long])
    items[:] = [item for item in items if item not in long]
