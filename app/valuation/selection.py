"""What to do with values: the best rows under a budget of tokens, and a price split over rows.

Rows that say the same are worth less together than apart. `select` can weigh that by maximal marginal relevance
(Carbonell and Goldstein, 1998). It is written here, in a few lines of numpy: apricot, the library that people name for
it, has had no release since 2021.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from app.influence.errors import SpecError

Places = NDArray[np.int64]


def select(
    values: ArrayLike,
    tokens: Sequence[int],
    *,
    most: int | None = None,
    token_budget: int | None = None,
    vectors: NDArray[np.float32] | None = None,
    diversity: float = 0.0,
) -> Places:
    """Places of the chosen rows, the best first; rows without a value are never chosen.

    A row that no longer fits the budget of tokens is passed over and smaller ones may follow.

    Args:
        values: [rows]; NaN for a row without one.
        tokens: [rows]
        most: rows at most.
        vectors: [rows, width], by whose direction rows are alike; needed for diversity.
        diversity: 0 takes the highest values; above it a row's value (as a share of 0 to 1 of the values' range) loses
            `diversity` times its cosine to the most similar row already chosen, and keeps 1 - `diversity` of itself.

    Raises:
        SpecError: no limit, or a diversity outside 0 to 1 or without vectors.
    """
    worth, sizes = np.asarray(values, dtype=np.float64), np.asarray(tokens, dtype=np.int64)
    if most is None and token_budget is None:
        raise SpecError("say how many rows or how many tokens may be chosen", field="k")
    if not 0 <= diversity < 1:
        raise SpecError("diversity is at least 0 and below 1", field="diversity")
    left = token_budget if token_budget is not None else int(sizes.sum())
    most = min(most if most is not None else len(worth), len(worth))
    open_ = np.isfinite(worth)
    if diversity == 0:
        return _greedy(np.argsort(-np.where(open_, worth, -np.inf), kind="stable")[: open_.sum()], sizes, most, left)
    if vectors is None:
        raise SpecError("diversity needs the rows' vectors", field="diversity")
    unit = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    finite = worth[open_]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    share = (worth - low) / (high - low if high > low else 1.0)
    nearest = np.zeros(len(worth))
    chosen: list[int] = []
    while len(chosen) < most:
        open_ &= sizes <= left
        if not open_.any():
            break
        gain = np.where(open_, (1 - diversity) * share - diversity * nearest, -np.inf)
        best = int(gain.argmax())
        chosen.append(best)
        open_[best] = False
        left -= int(sizes[best])
        nearest = np.maximum(nearest, unit @ unit[best])
    return np.array(chosen, dtype=np.int64)


def _greedy(order: Places, sizes: NDArray[np.int64], most: int, left: int) -> Places:
    chosen: list[int] = []
    for row in order.tolist():
        if len(chosen) == most:
            break
        if sizes[row] <= left:
            chosen.append(row)
            left -= int(sizes[row])
    return np.array(chosen, dtype=np.int64)


def split_price(values: ArrayLike, budget: int) -> NDArray[np.int64]:
    """A budget in whole units (cents) over rows, in proportion to their positive values; it is spent to the last unit.

    Rows that do harm or have no value get nothing; remainders go to the rows whose share was cut the most.

    Raises:
        SpecError: a negative budget, or no row of positive value.
    """
    worth = np.nan_to_num(np.asarray(values, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0).clip(min=0)
    if budget < 0:
        raise SpecError("a budget is not negative", field="budget")
    if not worth.any():
        raise SpecError("no row has a positive value: there is nothing to pay for", field="budget")
    exact = worth / math.fsum(worth) * budget
    paid = np.floor(exact).astype(np.int64)
    rest = budget - int(paid.sum())
    paid[np.argsort(paid - exact, kind="stable")[:rest]] += 1
    return paid
