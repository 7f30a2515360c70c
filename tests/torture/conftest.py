"""The long trials run only with `-m torture` (make torture); the default suite has a share."""

import pytest


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "torture" in (config.option.markexpr or ""):
        return
    long = [item for item in items if item.get_closest_marker("torture") is not None]
    config.hook.pytest_deselected(items=long)
    items[:] = [item for item in items if item not in set(long)]
