"""What values look like: the distribution, both ends, the harmful share, near-duplicates, value by metadata."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from app.influence.corpus import Row
from app.valuation.duplicates import near_duplicates

SHOWN = 20
"""Rows at either end, and groups of near-duplicates."""
KINDS = 50
"""A metadata column with more different values is an identifier, not a group."""
BINS = 40
QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


def summary(rows: Sequence[Row], values: NDArray[np.float64]) -> dict[str, Any]:
    """Of rows and their values [rows]; a row without a value has NaN, is counted, and is in nothing else."""
    known = np.flatnonzero(np.isfinite(values))
    found = values[known]
    order = known[np.argsort(-found, kind="stable")]
    alike = near_duplicates(f"{row.prompt}\n{row.response}" for row in rows)
    return {
        "rows": len(rows),
        "without_value": len(rows) - len(known),
        "distribution": _distribution(found),
        "negative_share": float((found < 0).mean()) if len(found) else None,
        "top": [_shown(rows, values, at) for at in order[:SHOWN]],
        "bottom": [_shown(rows, values, at) for at in order[::-1][:SHOWN]],
        "near_duplicates": {
            "groups": len(alike),
            "rows": sum(map(len, alike)),
            "shown": [[rows[at].id for at in group[:SHOWN]] for group in alike[:SHOWN]],
        },
        "by_metadata": _by_metadata(rows, values, known),
    }


def _shown(rows: Sequence[Row], values: NDArray[np.float64], at: np.intp) -> dict[str, Any]:
    return {"id": rows[int(at)].id, "value": float(values[at])}


def _distribution(found: NDArray[np.float64]) -> dict[str, Any] | None:
    if not len(found):
        return None
    counts, edges = np.histogram(found, BINS)
    return {
        "mean": float(found.mean()),
        "std": float(found.std()),
        "quantiles": {str(q): float(np.quantile(found, q)) for q in QUANTILES},
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
    }


def _by_metadata(rows: Sequence[Row], values: NDArray[np.float64], known: NDArray[np.intp]) -> dict[str, Any]:
    columns: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for at in known.tolist():
        for name, value in rows[at].metadata.items():
            if isinstance(value, str | int | bool):
                columns[name][str(value)].append(float(values[at]))
    return {
        name: {
            value: {
                "rows": len(found),
                "mean": float(np.mean(found)),
                "negative_share": float((np.array(found) < 0).mean()),
            }
            for value, found in sorted(kinds.items())
        }
        for name, kinds in sorted(columns.items())
        if 1 < len(kinds) <= KINDS
    }
