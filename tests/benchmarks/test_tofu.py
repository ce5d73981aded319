"""TOFU's measures against their formulas on numbers made by hand."""

import math
from itertools import combinations

import pytest
from tofu import harmonic_mean, ks_pvalue, rouge_l_recall, share_of_options, truth_ratio


def test_truth_ratio_is_the_wrong_answers_geometric_mean_probability_over_the_right_ones() -> None:
    wrong = [0.1, 0.4]
    losses = [-math.log(p) for p in wrong]
    assert truth_ratio(-math.log(0.5), losses) == pytest.approx(math.sqrt(0.1 * 0.4) / 0.5)


def test_a_right_answers_share_of_its_options() -> None:
    assert share_of_options(-math.log(0.6), [-math.log(0.3), -math.log(0.1)]) == pytest.approx(0.6)


def test_rouge_l_recall_is_the_longest_common_subsequence_over_the_reference() -> None:
    assert rouge_l_recall("The cat sat on the mat.", "a cat on a mat") == pytest.approx(3 / 6)
    assert rouge_l_recall("one two", "two one") == pytest.approx(1 / 2)
    assert rouge_l_recall("one two", "") == 0


def test_one_measure_of_nothing_makes_the_utility_nothing() -> None:
    assert harmonic_mean([1.0, 0.5]) == pytest.approx(2 / 3)
    assert harmonic_mean([1.0, 0.0]) == 0


def distance(first: list[float], second: list[float]) -> float:
    return max(
        abs(sum(x <= at for x in first) / len(first) - sum(x <= at for x in second) / len(second))
        for at in first + second
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 7.0]),
        ([1.0, 4.0, 6.0], [2.0, 3.0, 5.0, 7.0]),
        ([1.0, 2.0, 7.0, 8.0], [3.0, 4.0, 5.0, 6.0]),
    ],
)
def test_the_p_value_is_the_share_of_all_splits_that_are_as_far_apart(first: list[float], second: list[float]) -> None:
    together, seen = first + second, distance(first, second)
    far = [
        distance([together[at] for at in chosen], [x for at, x in enumerate(together) if at not in chosen])
        >= seen - 1e-9
        for chosen in combinations(range(len(together)), len(first))
    ]
    assert ks_pvalue(first, second) == pytest.approx(sum(far) / len(far))


def test_the_same_sample_twice_has_a_p_value_of_one() -> None:
    assert ks_pvalue([1.0, 2.0], [1.0, 2.0]) == 1.0
