"""A page's address is a link, unless the page wrote it and the browser is only late."""

from types import SimpleNamespace

import pytest

from dashboards import address


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time, and a browser whose address a test sets."""
    found = SimpleNamespace(now=100.0, query_params={}, session_state={})
    monkeypatch.setattr(address, "st", found)
    monkeypatch.setattr(address.time, "monotonic", lambda: found.now)
    return found


def test_the_address_before_a_change_is_no_link_for_a_moment(clock: SimpleNamespace) -> None:
    address.write("page", {"keep": "100"})
    clock.now += 60
    address.write("page", {"keep": "99"})
    clock.now += 1
    clock.query_params = {"keep": "100"}  # what the browser still has with the next key pressed
    assert address.arrived("page", ["keep"]) == {}
    clock.now += 3
    assert address.arrived("page", ["keep"]) == {"keep": "100"}, "now it is the reader's way back"


def test_another_address_is_a_link_at_once(clock: SimpleNamespace) -> None:
    address.write("page", {"keep": "100"})
    clock.query_params = {"keep": "70"}
    assert address.arrived("page", ["keep"]) == {"keep": "70"}
    clock.query_params = {"keep": "100"}
    assert address.arrived("page", ["keep"]) == {}
