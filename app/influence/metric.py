"""How two gradients are compared: what a query is turned into, what both are divided by, and what that is called.

With A = 1 where nothing preconditions, else the damped inverse of the rows' second moments (curvature.py):

    none, fisher   normalize "none": <A q, g>    "unit": <A q, g> / (|A q| |g|)
    trackstar                                     <A q, g> / sqrt(<A q, q> <A g, g>)

All are linear in the query but for a divisor of the whole query: a token's share of a score is the same with its
own gradient in the place of q.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Literal

import torch

from app.influence.curvature import DAMPING, Curvature, Precondition
from app.influence.errors import QueryError
from app.influence.index import Normalize, Searchable

BY_NORM = 25.0
"""Percentile points: so many of the rows point closer to the generation than a row does that scores above them."""


class Metric:
    """One way to compare, on one index. Vectors are [n, checkpoints * width].

    Attributes:
        rows: what `Searchable.top` multiplies a stored unit vector by.
        curvature: None where nothing preconditions.
    """

    def __init__(self, index: Searchable, normalize: Literal["none", "unit"], precondition: Precondition) -> None:
        """Raises QueryError where the index has no second moments, or the two contradict each other."""
        self.index, self.normalize, self.precondition = index, normalize, precondition
        if precondition == "trackstar" and normalize != "unit":
            detail = 'trackstar is a cosine: leave `normalize` out, or ask for precondition "fisher"'
            raise QueryError(detail, field="normalize")
        self.rows: Normalize = "scaled" if precondition == "trackstar" else normalize
        self.curvature = None if precondition == "none" else _curvature(index)

    def turn(self, vectors: torch.Tensor) -> torch.Tensor:
        """A v."""
        return vectors if self.curvature is None else self.curvature.apply(vectors)

    def query(self, vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A q, and what it is divided by: [queries, checkpoints]."""
        turned = self.turn(vectors)
        return turned, self._lengths(vectors if self.rows == "scaled" else turned, turned)

    def row(self, vectors: torch.Tensor) -> torch.Tensor:
        """What rows are divided by, [n, checkpoints]."""
        return self._lengths(vectors, self.turn(vectors) if self.rows == "scaled" else vectors)

    def factors(self, ids: Sequence[str], norms: torch.Tensor) -> torch.Tensor:
        """What the stored unit vectors of rows are multiplied by, [n, checkpoints]; `norms` are those of the rows."""
        if self.rows == "scaled":
            return self.index.scales(ids)
        return norms if self.rows == "none" else torch.ones_like(norms)

    def direction_percentiles(
        self, turned: torch.Tensor, ids: Sequence[Sequence[str]], among: Collection[str] | None
    ) -> list[list[float]]:
        """Where rows would stand by direction alone ("unit"): percentiles of each query's rows.

        Args:
            turned: A q of the queries.
        """
        unit = Metric(self.index, "unit", self.precondition)
        weights = torch.tensor(self.index.manifest.weights) / unit._lengths(turned, turned)
        return self.index.below(turned * weights.repeat_interleave(self.index.manifest.width, 1), ids, among)

    @property
    def name(self) -> str:
        """Of the score."""
        layer = self.index.manifest.spec["normalisation"] == "layer"
        kind = "cosine" if self.normalize == "unit" else "dot"
        if self.precondition == "none":
            return f"{'layer' if layer else 'gradient'}_{kind}"
        name = "trackstar" if self.precondition == "trackstar" else f"fisher_{kind}"
        return f"layer_{name}" if layer else name

    @property
    def formula(self) -> str:
        """Of the score, in words that the answer explains itself by."""
        query = "<g_q, g_z>" if self.precondition == "none" else "<A g_q, g_z>"
        length = "|g_q| |g_z|" if self.precondition == "none" else "|A g_q| |g_z|"
        divisors = {"none": "", "unit": f" / ({length})", "scaled": " / sqrt(<A g_q, g_q> <A g_z, g_z>)"}
        layer = " of layer-normalised gradients" if self.index.manifest.spec["normalisation"] == "layer" else ""
        formula = f"sum over checkpoints of weight x {query}{divisors[self.rows]}{layer}"
        if self.curvature is None:
            return formula
        return f"{formula}, A = (H + {DAMPING:g} x mean eigenvalue of H)^-1, H = mean of g_z g_z^T, module by module"

    def _lengths(self, vectors: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
        many = len(self.index.manifest.checkpoints)
        if self.rows == "none":
            return torch.ones(len(vectors), many)
        squares: torch.Tensor = (vectors.unflatten(1, (many, -1)) * others.unflatten(1, (many, -1))).sum(2)
        lengths: torch.Tensor = squares.clamp_min(0).sqrt()
        return lengths.clamp_min(torch.finfo(lengths.dtype).tiny)


def _curvature(index: Searchable) -> Curvature:
    if index.curvature is not None:
        return index.curvature
    try:
        index.manifest.blocks()
    except ValueError as error:
        raise QueryError(str(error), field="precondition") from error
    detail = "the index was built before second moments were gathered: repair it (POST /indexes/{index}/repair), which "
    raise QueryError(f"{detail}gathers them and computes no gradient again", field="precondition")
