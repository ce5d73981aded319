"""The texts of the rows that a search found, in one round trip to the database.

The library asks for one text at a time, and in the middle of a pass; the search before it knows all of them.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from app.influence.corpus import Row
from app.influence.index import Best, Normalize, Ranked, Searchable

Fetch = Callable[[Sequence[str]], dict[str, Row]]


class Noting(Searchable):
    """An open index that notes which rows its searches found; the first text that is asked for brings all theirs."""

    def __init__(self, index: Searchable, fetch: Fetch) -> None:
        vars(self).update(vars(index))
        self._index = index
        self._fetch = fetch
        self._found: list[str] = []
        self._texts: dict[str, Row] = {}

    def top(
        self,
        vectors: torch.Tensor,
        k: int,
        normalize: Normalize,
        largest: bool,
        among: Collection[str] | None = None,
    ) -> list[list[Ranked]]:
        """As the index does it."""
        ranked = super().top(vectors, k, normalize, largest, among)
        self._found += [row.id for one in ranked for row in one]
        return ranked

    def best(self, *asked: Any, **how: Any) -> Sequence[Best]:
        """As the index does it."""
        return self._index.best(*asked, **how)

    def lower(self, *asked: Any, **how: Any) -> Sequence[NDArray[np.int64]]:
        """As the index does it."""
        return self._index.lower(*asked, **how)

    def stored(self, *asked: Any, **how: Any) -> Mapping[int, tuple[NDArray[np.float16], NDArray[np.float32]]]:
        """As the index does it."""
        return self._index.stored(*asked, **how)

    def row_of(self, row_id: str) -> Row:
        """A row's text."""
        if row_id not in self._texts:
            self._texts |= self._fetch([row_id, *self._found])
        return self._texts[row_id]
