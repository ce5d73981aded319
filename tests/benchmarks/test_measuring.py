"""What the benchmarks of quality measure, against values that can be worked out by hand."""

import numpy as np
import pytest
from measuring import mean, overlap, places, spearman
from retraining import Bank


def test_the_gold_rows_place_counts_from_one_and_ties_share_the_middle() -> None:
    scores = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 1.0], [0.0, 5.0, 5.0]])
    assert places(scores, [0, 1, 1]).tolist() == [1.0, 2.0, 1.5]


def test_spearman_sees_order_alone_and_a_constant_column_has_none() -> None:
    first = np.array([[1.0, 1.0, 7.0], [2.0, 5.0, 7.0], [30.0, 2.0, 7.0]])
    second = np.array([[-1.0, -1.0, 1.0], [0.0, -5.0, 2.0], [0.5, -2.0, 3.0]])
    assert spearman(first, second) == pytest.approx([1.0, -1.0, 0.0])


def test_spearman_gives_ties_the_mean_of_their_ranks() -> None:
    # Ranks 1.5 1.5 3 4 and 1 2 3 4: a covariance of 4.5 over sqrt(4.5 * 5).
    assert spearman(np.array([[0.0], [0.0], [1.0], [2.0]]), np.arange(4.0)[:, None]) == pytest.approx([0.9**0.5])


def test_overlap_is_of_the_first_rows_alone() -> None:
    assert overlap(np.array([[4.0, 3.0, 2.0, 1.0]]), np.array([[4.0, 1.0, 2.0, 3.0]]), 2).tolist() == [0.5]


def test_the_interval_of_a_mean_holds_it_and_is_the_same_every_time() -> None:
    values = np.arange(20.0)
    assert mean(values) == mean(values)
    assert mean(values).low < mean(values).value == 9.5 < mean(values).high


def test_scores_that_add_up_to_the_losses_have_an_lds_of_one() -> None:
    rng = np.random.default_rng(0)
    masks = rng.random((30, 8)) < 0.5
    effects = rng.normal(size=(3, 8))
    losses = -(masks @ effects.T)[:, None, :].repeat(2, axis=1)
    bank = Bank(masks, losses.astype(np.float32))
    assert bank.lds(effects) == pytest.approx([1.0] * 3, abs=1e-3)
    assert bank.lds(-effects) == pytest.approx([-1.0] * 3, abs=1e-3)
    assert bank.agreement == pytest.approx([1.0] * 3)
