"""The texts of the rows that a search found, in one round trip to the database.

The library asks for one text at a time, and in the middle of a pass; the search before it knows all of them.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Literal

import torch

from app.influence.corpus import Row
from app.influence.index import Index, Ranked

Fetch = Callable[[Sequence[str]], dict[str, Row]]


class Noting(Index):
    """An open index that notes which rows its searches found; the first text that is asked for brings all theirs."""

    def __init__(self, index: Index, fetch: Fetch) -> None:
        vars(self).update(vars(index))
        self._fetch = fetch
        self._found: list[str] = []
        self._rows: dict[str, Row] = {}

    def top(
        self,
        vectors: torch.Tensor,
        k: int,
        normalize: Literal["none", "unit"],
        largest: bool,
        among: Collection[str] | None = None,
    ) -> list[list[Ranked]]:
        """As the index does it."""
        ranked = super().top(vectors, k, normalize, largest, among)
        self._found += [row.id for one in ranked for row in one]
        return ranked

    def row_of(self, row_id: str) -> Row:
        """A row's text."""
        if row_id not in self._rows:
            self._rows |= self._fetch([row_id, *self._found])
        return self._rows[row_id]
