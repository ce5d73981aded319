"""Rows of an index whose gradients point where other rows' gradients point: those that an unlearning may take along."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from app.influence.errors import SpecError
from app.influence.index import Searchable


def nearest(index: Searchable, rows: Sequence[str], k: int, among: Collection[str]) -> list[str]:
    """Ids of the k rows `among` those given that have the highest mean cosine with `rows`, highest first.

    Raises:
        SpecError: the index holds none of the rows.
    """
    held = set(index.ids)
    there = [row for row in rows if row in held]
    if not there:
        raise SpecError("the index holds none of these rows", field="index")
    units, _ = index.vectors(there)  # [rows, checkpoints * width]
    weights = torch.tensor([checkpoint["weight"] for checkpoint in index.manifest.checkpoints])
    query = units.mean(0, keepdim=True) * weights.repeat_interleave(index.manifest.width)
    return [one.id for one in index.top(query, k, "unit", True, among)[0]]
