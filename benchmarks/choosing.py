"""How a benchmark of unlearning chooses among learning rates, and its intervals over seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev

QUANTILE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
"""Student's t at .975, by degrees of freedom."""


def choose(residue: Sequence[float], damage: Sequence[float], most: float) -> int:
    """The place of the trial with the least damage among those that leave at most `most` behind.

    Where none does: the one that leaves least, of equals the one with the least damage.

    Args:
        residue: what is left of the behaviour, on validation prompts; lower is better.
        damage: what was lost besides, on validation rows; lower is better. What is not finite loses to all else.
    """
    harm = [value if math.isfinite(value) else math.inf for value in damage]
    places = range(len(harm))
    clean = [at for at in places if residue[at] <= most and math.isfinite(harm[at])]
    if clean:
        return min(clean, key=lambda at: harm[at])
    return min(places, key=lambda at: (residue[at], harm[at]))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half the width of Student's 95 % interval over seeds; one seed has no width (nan)."""
    if len(values) < 2:
        return fmean(values), math.nan
    return fmean(values), QUANTILE[len(values) - 1] * stdev(values) / math.sqrt(len(values))
