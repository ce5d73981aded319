"""The lines that scale.py prints are those through the points, and it says when there is none."""

import pytest
from scale import SEARCH, fit

CONSTANTS = {"a search": 2e-3, "a row": 3e-6, "a stored number": 4e-10}


def points(bend: float = 0.0) -> list[dict[str, float]]:
    made = []
    for rows in (1000.0, 4000.0, 16000.0):
        for width in (500.0, 8000.0):
            point = {"rows": rows, "width": width}
            straight = sum(constant * SEARCH[name](point) for name, constant in CONSTANTS.items())
            made.append({**point, "seconds": straight + bend * rows * rows * width})
    return made


def test_a_line_is_found_again() -> None:
    line = fit(points(), SEARCH)
    assert line.constants == pytest.approx(CONSTANTS, rel=1e-6)
    assert line.r2 == pytest.approx(1) and line.worst < 1e-6


def test_a_cost_that_bends_is_no_line() -> None:
    line = fit(points(bend=1e-13), SEARCH)
    assert line.r2 < 0.99 and line.worst > 0.1
