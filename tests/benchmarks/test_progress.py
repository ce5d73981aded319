"""How a default is chosen among checkpoints, and how a threshold would warn."""

import numpy as np
from progress import Choice, Moment, alarms, cheapest, choices


def test_among_choices_near_the_best_the_one_with_the_fewest_checkpoints_is_taken() -> None:
    best = Choice("a", "all", (0, 1, 2), {"LDS": 1.0, "MRR": 1.0})
    near = Choice("a", "one", (1,), {"LDS": 0.99, "MRR": 0.98})
    poor = Choice("b", "one", (0,), {"LDS": 1.0, "MRR": 0.5})
    assert cheapest([best, near, poor]) == (best, near)


def test_a_sum_over_checkpoints_is_the_weighted_sum_of_their_scores() -> None:
    moments = [Moment(e, train, 1.0, {"s": np.full((1, 1), e)}) for e, train in ((1.0, 0.8), (2.0, 0.4), (3.0, 0.2))]
    found = {c.name: c.worth["it"] for c in choices(moments, "s", {"it": lambda s: float(s[0, 0])}, last=2, warned=0.5)}
    assert found["epoch 2"] == 2.0
    assert found["all"] == 6.0
    assert abs(found["all, by loss ratio"] - (0.8 + 2 * 0.4 + 3 * 0.2)) < 1e-6
    assert found["those without a warning"] == 1.0


def test_a_threshold_is_judged_by_the_lost_checkpoints_that_it_catches_and_the_sound_ones_that_it_does_not() -> None:
    points = [(0.1, 0.5), (0.3, 0.95), (0.6, 0.7), (0.9, 1.0)]
    (low, high) = alarms(points, (0.2, 0.7))
    assert (low.caught, low.false) == (0.5, 0.0)
    assert (high.caught, high.false) == (1.0, 0.5)
