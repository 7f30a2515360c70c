"""The comparison with other libraries: fronts, sides, and the search for a coefficient."""

import math

import pytest

from benchmarks.peers.fronts import Point, error_at, front, hull, next_coefficient, side
from benchmarks.peers.results import judged

FRONT = [Point(16, 0.4), Point(64, 0.2)]


def test_a_front_holds_what_nothing_beats() -> None:
    beaten = [Point(20, 0.4), Point(64, 0.3), Point(100, 0.2)]
    assert front([*beaten, *reversed(FRONT)]) == FRONT


def test_a_hull_leaves_out_what_is_above_its_lines() -> None:
    assert hull([*FRONT, Point(32, 0.31)]) == FRONT
    assert hull([*FRONT, Point(32, 0.29)]) == [FRONT[0], Point(32, 0.29), FRONT[1]]
    assert hull([Point(2, 0.9), Point(4, 0.89), Point(8, 0.88), Point(16, 0.4)]) == [
        Point(2, 0.9),
        Point(16, 0.4),
    ]


def test_a_front_is_straight_in_log_l0() -> None:
    assert error_at(FRONT, 32) == pytest.approx(0.3)
    assert error_at(FRONT, 16) == pytest.approx(0.4)
    assert error_at(FRONT, 64) == error_at(FRONT, 500) == 0.2
    # the first line goes on a little, and no further
    assert error_at(FRONT, 16 / 1.05) == pytest.approx(0.4 + 0.1 * math.log2(1.05))
    assert error_at(FRONT, 14) is None
    assert error_at([], 32) is None
    assert error_at([Point(16, 0.4)], 16) == 0.4
    assert error_at([Point(16, 0.4)], 15.9) is None


def test_sides_of_a_front() -> None:
    assert side(0.29, 0.3, 0.01) == "inside"
    assert side(0.305, 0.3, 0.01) == "on"
    assert side(0.32, 0.3, 0.01) == "outside"
    assert side(None, 0.3, 0.01) == "not reached"


def row(l0: float, fvu: float) -> dict[str, str]:
    return {"l0": f"{l0}", "fvu": f"{fvu}", "fvu_interval": "0.01"}


def test_every_row_is_judged_by_the_best_peer_at_its_l0() -> None:
    ours = [row(16, 0.39), row(64, 0.2)]
    # the row at L0 32 is no peer's best: those at 16 and 64 give 0.3 there
    found = list(judged([row(32, 0.35), row(64, 0.2), row(16, 0.4), row(4, 0.9)], ours, "fvu"))
    assert [each[-1] for each in found] == ["not reached", "inside", "inside", "inside"]
    assert found[2][1] == pytest.approx(0.3)
    assert found[2][2] == pytest.approx(0.295)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.5])
def test_the_search_reaches_every_target(power: float) -> None:
    tried: dict[float, float] = {}
    while (value := next_coefficient(tried, (32, 16, 64), start=5.0, most=9)) is not None:
        assert value not in tried
        tried[value] = 3000 / (1 + value) ** power
    assert len(tried) < 9
    for target in (16, 32, 64):
        assert min(abs(math.log(l0 / target)) for l0 in tried.values()) <= math.log(1.1)


def test_the_search_ends() -> None:
    tried: dict[float, float] = {}
    while (value := next_coefficient(tried, (32,), start=5.0, most=4)) is not None:
        tried[value] = 500.0  # whatever the coefficient
    assert len(tried) == 4
    assert next_coefficient({5.0: 0.0}, (32,), start=5.0, most=4) == pytest.approx(0.625)
