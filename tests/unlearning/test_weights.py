"""The published mapping against a plain, slow writing of it, and what must hold whatever the numbers."""

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from app.unlearning.weights import influence_weights

NUMBERS = st.floats(-50, 50, allow_nan=False, width=32)


def plainly(own: Any, other: Any, top_k: int, temperature: float, low: float, high: float) -> list[float]:
    """METHODS section 4, steps 2 to 5, one number at a time."""

    def a_row(view: Any) -> list[float]:
        kept = []
        for query in view.tolist():
            best = sorted(range(len(query)), key=lambda row: -query[row])[:top_k]
            kept.append([query[row] if row in best else 0.0 for row in range(len(query))])
        return [statistics.median(column) for column in zip(*kept, strict=True)]

    score = [a - b for a, b in zip(a_row(own), a_row(other), strict=True)]
    middle = statistics.median(score)
    spread = max(1.4826 * statistics.median(abs(x - middle) for x in score), 1e-3)
    raw = [math.exp(min(max((x - middle) / spread / temperature, math.log(low)), math.log(high))) for x in score]
    return [x / statistics.fmean(raw) for x in raw]


def views(rows: int, draw: Any) -> tuple[Any, Any]:
    return tuple(draw(arrays(np.float64, (draw(st.integers(1, 7)), rows), elements=NUMBERS)) for _ in range(2))  # type: ignore[return-value]


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_the_published_mapping_is_reproduced(data: Any) -> None:
    rows = data.draw(st.integers(1, 12))
    own, other = views(rows, data.draw)
    top_k = data.draw(st.integers(1, 14))
    temperature = data.draw(st.sampled_from((0.7, 1.2)))
    found = influence_weights(own, other, top_k=top_k, temperature=temperature)
    assert found == pytest.approx(plainly(own, other, top_k, temperature, 0.2, 3.0), abs=1e-9)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_weights_have_mean_one_and_keep_their_bounds(data: Any) -> None:
    own, other = views(data.draw(st.integers(1, 12)), data.draw)
    weights = influence_weights(own, other, top_k=data.draw(st.sampled_from((None, 3))), temperature=0.7)
    assert weights.mean() == pytest.approx(1)
    assert (weights > 0).all()
    assert weights.max() <= weights.min() * (3.0 / 0.2) * (1 + 1e-12)


@given(data=st.data())
@settings(max_examples=100, deadline=None)
def test_a_row_that_scores_higher_weighs_no_less(data: Any) -> None:
    own, other = views(data.draw(st.integers(2, 12)), data.draw)
    weights = influence_weights(own, other, top_k=None, temperature=1.2)
    score = np.median(own, axis=0) - np.median(other, axis=0)
    order = np.argsort(score, kind="stable")
    assert (np.diff(weights[order]) >= -1e-12).all()


def test_with_the_cut_most_rows_weigh_the_same_and_without_it_they_do_not() -> None:
    rng = np.random.default_rng(0)
    own, other = rng.normal(size=(9, 200)), rng.normal(size=(9, 200))
    cut = influence_weights(own, other, top_k=40, temperature=0.7)
    full = influence_weights(own, other, top_k=None, temperature=0.7)
    values, counts = np.unique(cut, return_counts=True)
    assert counts.max() > 100, "the median over queries is 0 where most of them cut the row"
    assert len(values) < len(np.unique(full))


@pytest.mark.parametrize(
    ("own", "other", "more", "said"),
    [
        (np.ones((2, 3)), np.ones((2, 4)), {}, "same rows"),
        (np.ones(3), np.ones((2, 3)), {}, r"\[queries, rows\]"),
        (np.ones((0, 3)), np.ones((2, 3)), {}, "at least one"),
        (np.full((1, 2), np.nan), np.ones((1, 2)), {}, "not finite"),
        (np.ones((1, 2)), np.ones((1, 2)), {"minimum": 2.0}, "bounds"),
        (np.ones((1, 2)), np.ones((1, 2)), {"temperature": 0.0}, "temperature"),
        (np.ones((1, 2)), np.ones((1, 2)), {"top_k": 0}, "top_k"),
    ],
)
def test_what_cannot_be_weighed_is_refused(own: Any, other: Any, more: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        influence_weights(own, other, **{"temperature": 0.7, **more})
