"""Python's search for cycles is put off within a block, and goes on after it."""

import gc
import weakref

import pytest

from saescope.memory import cycles_later


class Cycle:
    def __init__(self) -> None:
        self.own = self


def enough_to_look() -> list[list[int]]:
    """More objects than the collector lets pass without a look at the youngest."""
    return [[number] for number in range(2 * gc.get_threshold()[0])]


def test_cycles_are_found_after_the_block() -> None:
    with cycles_later():
        left = weakref.ref(Cycle())
        enough_to_look()
        assert left() is not None
        with cycles_later():
            assert not gc.isenabled()
        assert not gc.isenabled(), "the outer block goes on"
    assert gc.isenabled()
    gc.collect()
    assert left() is None


def test_an_error_ends_the_block() -> None:
    with pytest.raises(KeyError), cycles_later():
        raise KeyError
    assert gc.isenabled()
