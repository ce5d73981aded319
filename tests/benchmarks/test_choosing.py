"""How the benchmark of unlearning chooses a rate, and what its intervals are."""

import math

import pytest
from choosing import choose, interval


def test_among_rates_that_remove_the_behaviour_the_least_damage_wins() -> None:
    assert choose([0.0, 0.05, 0.5], [2.0, 1.0, 0.1], most=0.05) == 1


def test_where_no_rate_removes_it_the_least_residue_wins_and_then_the_least_damage() -> None:
    assert choose([0.9, 0.4, 0.4], [0.1, 3.0, 2.0], most=0.05) == 2


def test_a_rate_that_broke_the_model_never_wins_over_one_that_did_not() -> None:
    assert choose([0.0, 0.0], [math.nan, 9.0], most=0.05) == 1


def test_the_interval_over_seeds_is_students() -> None:
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / math.sqrt(3))
    assert math.isnan(interval([1.0])[1])
