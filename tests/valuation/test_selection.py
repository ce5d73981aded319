"""Choosing rows, paying for them, and telling a pool's rows apart."""

import numpy as np
import pytest

from app.influence.corpus import Row, parse_row
from app.influence.errors import SpecError
from app.valuation.drawing import at_random, spread, unsure
from app.valuation.duplicates import near_duplicates
from app.valuation.ranks import interval, spearman
from app.valuation.selection import select, split_price
from app.valuation.student import Ridge
from app.valuation.summary import summary

NAN = float("nan")


def test_the_best_rows_are_chosen_and_those_without_a_value_never() -> None:
    assert select([1.0, NAN, 3.0, 2.0], [1, 1, 1, 1], most=2).tolist() == [2, 3]
    assert select([1.0, NAN, 3.0, 2.0], [1, 1, 1, 1], most=9).tolist() == [2, 3, 0]


def test_a_row_that_does_not_fit_the_tokens_is_passed_over() -> None:
    assert select([3.0, 2.0, 1.0], [5, 9, 4], token_budget=10).tolist() == [0, 2]
    vectors = np.eye(3, dtype=np.float32)
    assert select([3.0, 2.0, 1.0], [5, 9, 4], token_budget=10, vectors=vectors, diversity=0.1).tolist() == [0, 2]


def test_diversity_takes_the_second_best_of_another_kind() -> None:
    vectors = np.array([[1, 0], [1, 0.01], [0, 1], [0.1, 1]], dtype=np.float32)
    values = [1.0, 0.99, 0.6, 0.0]
    assert select(values, [1] * 4, most=2, vectors=vectors).tolist() == [0, 1]
    assert select(values, [1] * 4, most=2, vectors=vectors, diversity=0.5).tolist() == [0, 2]
    assert select([NAN, *values[1:]], [1] * 4, most=4, vectors=vectors, diversity=0.5).tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("options", "field"),
    [({}, "k"), ({"most": 1, "diversity": 1.0}, "diversity"), ({"most": 1, "diversity": 0.5}, "diversity")],
)
def test_a_choice_without_a_limit_or_without_vectors_is_refused(options: dict[str, float], field: str) -> None:
    with pytest.raises(SpecError) as caught:
        select([1.0], [1], **options)  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_price_is_spent_to_the_last_unit_on_what_helps() -> None:
    paid = split_price([1.0, -5.0, 1.0, NAN, 1.0], 100)
    assert paid.sum() == 100
    assert paid.tolist() == [34, 0, 33, 0, 33]
    for values, budget in (([-1.0, NAN], 5), ([1.0], -1)):
        with pytest.raises(SpecError) as caught:
            split_price(values, budget)
        assert caught.value.field == "budget"


def test_rank_correlation_shares_ranks_between_equals() -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 3], [1, 2, 3, 4]) == pytest.approx(0.9486832980505138)  # scipy.stats.spearmanr
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
    low, high = interval(0.6, 100)
    assert low < 0.6 < high
    assert interval(0.6, 1000)[0] > low


def test_near_duplicates_are_found_and_other_rows_are_not() -> None:
    long = (
        "the quick brown fox jumps over the lazy dog while the grey cat sleeps on the warm stone by the old mill gate"
    )
    texts = [
        long,
        "something else entirely, of no length",
        long.upper() + ".",
        "a third text that is alone in the pool",
        long,
    ]
    assert near_duplicates(texts) == [[0, 2, 4]]
    assert near_duplicates([]) == []


def test_a_spread_draw_takes_less_of_what_there_is_much_of() -> None:
    rng = np.random.default_rng(0)
    kind = np.repeat(np.arange(5), [200, 50, 20, 10, 5])
    features = (10 * np.eye(5)[kind] + rng.normal(size=(285, 5)) * 0.1).astype(np.float32)
    order = spread(features, 20, 0)
    assert sorted(order.tolist()) == list(range(285))
    assert (kind[order[:20]] == 0).sum() < 10  # 14 is its share
    assert spread(features, 20, 0).tolist() == order.tolist()


def test_draws_follow_from_the_seed_and_the_uncertainty() -> None:
    assert at_random(9, 1).tolist() == at_random(9, 1).tolist()
    assert at_random(9, 1).tolist() != at_random(9, 2).tolist()
    known = np.array([False, True, False, False])
    assert unsure(np.array([0.1, 9.0, 0.3, 0.2]), known, 2).tolist() == [2, 3]
    assert unsure(np.array([0.1, 9.0, 0.3, 0.2]), known, 9).tolist() == [2, 3, 0]


def test_left_out_predictions_are_those_of_fits_without_the_row() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(12, 4)), rng.normal(size=(12, 2))
    fast = Ridge(x, y)
    penalty = 0.3 * fast.unit
    for row in range(12):
        kept = np.arange(12) != row
        a, b = x[kept] - x[kept].mean(0), y[kept] - y[kept].mean(0)
        weights = np.linalg.solve(a.T @ a + penalty * np.eye(4), a.T @ b)
        wanted = y[kept].mean(0) + (x[row] - x[kept].mean(0)) @ weights
        assert fast.left_out(0.3)[row] == pytest.approx(wanted, rel=1e-9)


def test_a_summary_counts_what_it_is_given() -> None:
    rows = [parse_row({"prompt": f"p{n}", "response": f"r{n}", "source": "ab"[n % 2], "n": n / 2}) for n in range(6)]
    told = summary(rows, np.array([1.0, -1.0, 3.0, NAN, 0.5, -2.0]))
    assert (told["rows"], told["without_value"], told["negative_share"]) == (6, 1, 0.4)
    assert [one["value"] for one in told["top"]] == [3.0, 1.0, 0.5, -1.0, -2.0]
    assert told["bottom"][0]["value"] == -2.0
    assert told["by_metadata"]["source"]["a"] == {"rows": 3, "mean": 1.5, "negative_share": 0.0}
    assert "n" not in told["by_metadata"]
    nothing = summary([Row(rows[0].messages)], np.array([NAN]))
    assert nothing["distribution"] is None
