"""The four influence views FF, FR, RR and RF (METHODS section 4, step 1), and a number for each row from two of them.

A view holds the inner product of each query's projected gradient with each row's, summed over checkpoints with their
weights, as `/influence` scores rows. The vectors are an index's where it was built from this very model and holds the
row; the others are computed with the same projection into a small index beside the run, so that they lie on disk in the
same half precision, and a run that was killed finds them there. A view itself is rows x rows and never formed: it
passes by in blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from app.influence.building import Progress, build
from app.influence.corpus import Row
from app.influence.errors import Mismatch
from app.influence.index import Index, IndexSpec, open_index
from app.influence.models import LoadedModel
from app.unlearning.weights import Floats, highest

BLOCK = 2**25
"""float32 numbers of vectors in memory at once, for the queries and again for the rows (128 MiB each)."""
TILE = 2**23
"""float64 scores in memory at once (64 MiB)."""


class Vectors:
    """The stored vectors of rows, from an index that is there and from one that is made for the rest.

    Attributes:
        from_index: how many of the rows the index held.
        refused: why an index that was given did not serve.
        empty: rows whose gradient is zero or not finite; they influence nothing.
    """

    def __init__(
        self, model: LoadedModel, rows: Sequence[Row], spec: IndexSpec, index: Path | None, folder: Path
    ) -> None:
        self.model, self.spec, self.folder = model, spec, folder
        self.indexes: list[Index] = []
        self.refused: str | None = None
        if index is not None:
            opened = open_index(index)
            self.spec = opened.manifest.index_spec
            try:
                opened.check(model)
                self.indexes.append(opened)
            except Mismatch as error:
                self.refused = error.detail
        there = {row for one in self.indexes for row in one.ids}
        self.missing = [row for row in rows if row.id not in there]
        self.from_index = len(rows) - len(self.missing)
        self.empty: list[str] = []

    def compute(self) -> Iterator[Progress]:
        """Compute the vectors that are missing; a crash loses at most the shard in hand."""
        if self.missing:
            yield from build(self.folder, self.model, self.missing, self.spec, curvature=False)
            made = open_index(self.folder)
            self.indexes.append(made)
            self.empty = sorted({row.id for row in self.missing} - set(made.ids))
        self._owner = {row: number for number, one in enumerate(self.indexes) for row in one.ids}

    def told(self) -> dict[str, Any]:
        """Where the influence came from, for the report."""
        return {
            "rows_from_index": self.from_index,
            "rows_computed": len(self.missing),
            "rows_without_gradient": self.empty,
            "index_refused": self.refused,
            "normalisation": self.spec.normalisation,
            "projection": asdict(self.spec.projection),
        }

    def per_row(
        self, queries: Sequence[str], rows: Sequence[str], top_k: int | None, unit: bool, into: Floats
    ) -> Iterator[None]:
        """`weights.per_row` of the view [queries, rows], without forming it; yields after each block.

        Args:
            unit: cosines instead of inner products.
            into: [rows]
        """
        if top_k is not None and top_k < len(rows):
            best = np.empty((len(queries), top_k), dtype=np.int64)
            kept = np.empty((len(queries), top_k))
            for place in _blocks(len(queries), TILE // len(rows)):
                view = np.empty((len(queries[place]), len(rows)))
                yield from self.view(queries[place], rows, unit, view)
                best[place] = highest(view, top_k)
                kept[place] = np.take_along_axis(view, best[place], axis=1)
            for place in _blocks(len(rows), TILE // len(queries)):
                view = np.zeros((len(queries), len(rows[place])))
                query, at = np.nonzero((best >= place.start) & (best < place.stop))
                view[query, best[query, at] - place.start] = kept[query, at]
                into[place] = np.median(view, axis=0)
                yield
            return
        for place in _blocks(len(rows), TILE // len(queries)):
            view = np.empty((len(queries), len(rows[place])))
            yield from self.view(queries, rows[place], unit, view)
            into[place] = np.median(view, axis=0)

    def view(self, queries: Sequence[str], rows: Sequence[str], unit: bool, into: Floats) -> Iterator[None]:
        """[queries, rows]; the vectors pass by in blocks."""
        many = BLOCK // self._columns
        for columns in _blocks(len(rows), many):
            right = self._vectors(rows[columns], unit)
            for place in _blocks(len(queries), many):
                left = self._vectors(queries[place], unit) * self._weights(unit)
                into[place, columns] = (left @ right.T).double().numpy()
                yield

    @property
    def _columns(self) -> int:
        return self.indexes[0].manifest.width * len(self.model.checkpoints)

    def _weights(self, unit: bool) -> torch.Tensor:
        """[columns]: the checkpoints' weights; a cosine's add up to 1."""
        weights = torch.tensor([checkpoint.weight for checkpoint in self.model.checkpoints])
        each = weights / weights.sum() if unit else weights
        return each.repeat_interleave(self._columns // len(each))

    def _vectors(self, rows: Sequence[str], unit: bool) -> torch.Tensor:
        """[rows, columns]"""
        found = torch.zeros(len(rows), self._columns)
        for number, index in enumerate(self.indexes):
            at = [place for place, row in enumerate(rows) if self._owner.get(row) == number]
            if at:
                units, norms = index.vectors([rows[place] for place in at])
                found[at] = units if unit else units * norms.repeat_interleave(units.shape[1] // norms.shape[1], 1)
        return found


def _blocks(count: int, most: int) -> Iterator[slice]:
    """So many things at a time, or one where not even one fits."""
    most = max(1, most)
    for start in range(0, count, most):
        yield slice(start, min(start + most, count))
