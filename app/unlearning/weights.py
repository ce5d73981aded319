"""A weight for each training row from its influence on what should go and on what should stay (RapidUn, 2025).

The published mapping, to the letter (METHODS section 4, steps 2 to 5): of each query's row of a view keep the `top_k`
highest influences and set the rest to 0; take the median over the queries, element by element; subtract what the rows
do to the other group; z-score robustly; exponentiate between bounds; divide by the mean.

With `top_k` below the number of rows most entries are 0 in most queries, so the median is 0 for all but a few rows and
the weights have next to no say. `top_k=None` keeps every entry: the same mapping without the cut.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
NORMAL = 1.4826
"""The standard deviation of a normal distribution over its median absolute deviation."""
FLOOR = 1e-3
"""The least spread that a group is taken to have, so that equal scores give equal weights."""


def influence_weights(
    own: ArrayLike,
    other: ArrayLike,
    *,
    top_k: int | None = 40,
    temperature: float,
    minimum: float = 0.2,
    maximum: float = 3.0,
    own_scale: float = 1.0,
    other_scale: float = 1.0,
) -> Floats:
    """One weight a row, with mean 1.

    For forget rows `own` is FF (queries: forget rows) and `other` FR (queries: retain rows), with temperature 0.7; for
    retain rows RR and RF, with 1.2.

    Args:
        own: [queries, rows], influence of the rows on their own group.
        other: [other queries, rows], influence of the same rows on the other group.
        top_k: entries that each query keeps; None keeps all.
        temperature: what z-scores are divided by before they are exponentiated; smaller is sharper.
        minimum, maximum: bounds of a weight before the division by the mean.

    Returns:
        [rows] float64.

    Raises:
        ValueError: shapes that do not fit, numbers that are not finite, bounds that do not hold 1.
    """
    mine, theirs = _view(own, "own"), _view(other, "other")
    if mine.shape[1] != theirs.shape[1]:
        raise ValueError(f"own has {mine.shape[1]} rows, other {theirs.shape[1]}: both score the same rows")
    score = own_scale * per_row(mine, top_k) - other_scale * per_row(theirs, top_k)
    return score_weights(score, temperature=temperature, minimum=minimum, maximum=maximum)


def score_weights(score: Floats, *, temperature: float, minimum: float = 0.2, maximum: float = 3.0) -> Floats:
    """Steps 4 and 5: a weight for each score [rows], with mean 1; the parameters are `influence_weights`'."""
    if not 0 < minimum <= 1 <= maximum:
        raise ValueError("the bounds must hold 1, and the minimum must be positive")
    if not temperature > 0:
        raise ValueError("the temperature must be positive")
    middle = np.median(score)
    spread = max(NORMAL * float(np.median(np.abs(score - middle))), FLOOR)
    z = (score - middle) / spread
    weights = np.exp(np.clip(z / temperature, np.log(minimum), np.log(maximum)))
    normalised: Floats = weights / weights.mean()
    return normalised


def _view(scores: ArrayLike, name: str) -> Floats:
    view: Any = np.asarray(scores, dtype=np.float64)
    if view.ndim != 2 or 0 in view.shape:
        raise ValueError(f"{name} is [queries, rows] and holds at least one of each, not {view.shape}")
    if not np.isfinite(view).all():
        raise ValueError(f"{name} holds numbers that are not finite")
    found: Floats = view
    return found


def per_row(view: Floats, top_k: int | None) -> Floats:
    """Step 2, [rows]: the median over queries of what each keeps."""
    if top_k is not None and top_k < view.shape[1]:
        if top_k < 1:
            raise ValueError("top_k is at least 1")
        kept = np.zeros_like(view)
        best = highest(view, top_k)
        np.put_along_axis(kept, best, np.take_along_axis(view, best, axis=1), axis=1)
        view = kept
    found: Floats = np.median(view, axis=0)
    return found


def highest(view: Floats, top_k: int) -> NDArray[np.int64]:
    """[queries, top_k]: the rows that each query keeps; of equals the earlier."""
    found: NDArray[np.int64] = np.argsort(-view, axis=1, kind="stable")[:, :top_k]
    return found
