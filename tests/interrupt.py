"""Stopping a piece of work at a chosen call, as a kill, a key or a full disk would."""

from typing import Any

import pytest


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


class Interrupt:
    """Raises an error at the n-th call of a method, once."""

    def __init__(
        self, patch: pytest.MonkeyPatch, owner: Any, name: str, at: int, error: BaseException
    ) -> None:
        self.calls = 0
        original = getattr(owner, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self.calls == at:
                raise error
            return original(*args, **kwargs)

        patch.setattr(owner, name, counted)
