"""Second moments of an index's rows, and scores that are preconditioned by them without a change of what is stored.

For each checkpoint and module H = E[g g^T] over the rows' projected gradients g (METHODS section 3): how much the rows
vary along each direction. Its damped inverse A = (H + lambda I)^-1, lambda a tenth of the mean eigenvalue, turns down
the directions that all rows share. "fisher" makes A q of a query's gradient q; "trackstar" measures lengths by A as
well: <q, A g> / sqrt(<q, A q> <g, A g>), the cosine of A^1/2 q and A^1/2 g. Of a row with the unit vector u that needs
one more number a checkpoint, 1 / sqrt(<u, A u>), its scale.

`gather` makes one file of inverses and scales in two passes over the mapped shards, when an index is published. It
follows from the shards alone, so that the same bytes come of it however often. Rows that were deleted stay counted:
the model was trained on them and is the same still, and a deletion changes no other row's score. A row that was deleted
and came back is counted once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save

from app.influence.projection import ProjectionSpec

if TYPE_CHECKING:
    from app.influence.index import Shard

Precondition = Literal["none", "fisher", "trackstar"]
DAMPING = 0.1
"""lambda, in mean eigenvalues of its block."""
WIDEST = 4096
"""Numbers of a block; its moments have as many squared. One of the usual `global` is as wide."""
LARGEST = 2**27
"""float32 numbers of a checkpoint's moments (512 MiB)."""
ROUNDING = 2.0**-48
"""Of a unit vector's mean square in a block: half precision's smallest step, squared. Below it there is only noise."""
TOGETHER = 2**23
"""Numbers of rows that are widened at once (32 MiB)."""


def blocks(projection: ProjectionSpec, modules: Sequence[dict[str, Any]], width: int) -> list[slice]:
    """Where each block lies in a checkpoint's vector: a module's numbers, or all that modules were summed into.

    Args:
        modules: as a manifest lists them.
        width: of the vector.

    Raises:
        ValueError: the moments would not fit, and why.
    """
    if projection.kind == "kronecker":
        size = projection.size
        widths = [min(one["d_out"], size) * min(one["d_in"], size) for one in modules]
    else:
        widths = [width]
    if max(widths) > WIDEST:
        raise ValueError(
            f"projection {projection.kind} of size {projection.size} makes blocks of {max(widths):,} numbers, whose "
            f"second moments would not fit (at most {WIDEST:,}): build an index with kronecker of size 16, or global "
            f"of size {WIDEST:,}"
        )
    numbers = sum(wide * wide for wide in widths)
    if numbers > LARGEST:
        raise ValueError(
            f"the second moments of a checkpoint would be {numbers:,} numbers (at most {LARGEST:,}): build an index "
            "with a smaller projection"
        )
    ends = np.cumsum(widths).tolist()
    if ends[-1] != width:
        raise ValueError(f"modules of {ends[-1]:,} numbers do not make a vector of {width:,}")
    return [slice(end - wide, end) for end, wide in zip(ends, widths, strict=True)]


@dataclass(frozen=True)
class Curvature:
    """The inverses and scales of an index, mapped from their file.

    Attributes:
        inverses: [checkpoint], each the blocks' [b, b] one after the other.
        scales: [rows, checkpoints] in the shards' order, rows that can never be found too.
        rows: that were counted.
    """

    places: list[slice]
    inverses: list[torch.Tensor]
    scales: NDArray[np.float32]
    rows: int

    @cached_property
    def _blocks(self) -> list[list[torch.Tensor]]:
        """[checkpoint][block]"""
        sides = [place.stop - place.start for place in self.places]
        parts = [flat.split([side * side for side in sides]) for flat in self.inverses]
        return [[part.view(side, side) for part, side in zip(one, sides, strict=True)] for one in parts]

    def apply(self, vectors: torch.Tensor) -> torch.Tensor:
        """A v, block by block, of vectors [n, checkpoints * width]."""
        found = torch.empty_like(vectors)
        width = self.places[-1].stop
        for checkpoint, inverses in enumerate(self._blocks):
            start = checkpoint * width
            for place, inverse in zip(self.places, inverses, strict=True):
                columns = slice(start + place.start, start + place.stop)
                torch.matmul(vectors[:, columns], inverse, out=found[:, columns])
        return found


def load(file: Path, places: list[slice], checkpoints: int, rows: int) -> Curvature:
    """Map a file that `gather` made.

    Raises:
        ValueError, SafetensorError: it is none of these blocks, checkpoints and rows.
    """
    with safe_open(file, "pt") as opened:
        inverses = [opened.get_tensor(f"inverse.{checkpoint}") for checkpoint in range(checkpoints)]
        scales = opened.get_tensor("scales").numpy()
        counted = int(opened.get_tensor("rows"))
    numbers = sum((place.stop - place.start) ** 2 for place in places)
    if scales.shape != (rows, checkpoints) or any(inverse.shape != (numbers,) for inverse in inverses):
        raise ValueError("it is not of the index's blocks and rows")
    return Curvature(places, inverses, scales, counted)


def gather(
    shards: Sequence[Shard], places: Sequence[slice], checkpoints: int, write: Callable[[bytes], None]
) -> Iterator[tuple[int, int]]:
    """Make the file's content and have it written; after each step (rows that are done, rows in all passes).

    Moments are those of the stored vectors times their norms, in units of the checkpoint's mean squared norm: float32
    sums, inverted in float64. A block in which rows have nothing but half precision's rounding has no inverse: zero.
    """
    counted = _counted(shards)
    rows = sum(len(shard.ids) for shard in shards)
    many = sum(int(mask.sum()) for mask in counted)
    done, total = 0, 2 * checkpoints * rows
    width = places[-1].stop
    made: dict[str, torch.Tensor] = {"rows": torch.tensor(many)}
    scales = torch.zeros(rows, checkpoints)
    for checkpoint in range(checkpoints):
        columns = slice(checkpoint * width, (checkpoint + 1) * width)
        squares = sum(
            float(np.square(s.norms[m, checkpoint], dtype=float).sum()) for s, m in zip(shards, counted, strict=True)
        )
        size = max((squares / max(many, 1)) ** 0.5, float(torch.finfo(torch.float32).tiny))
        sums = [torch.zeros(place.stop - place.start, place.stop - place.start) for place in places]
        for shard, mask in zip(shards, counted, strict=True):
            for at, units in _widened(shard, columns):
                factors = torch.from_numpy(np.where(mask[at], shard.norms[at, checkpoint], 0).astype(np.float32) / size)
                units *= factors[:, None]
                for place, moments in zip(places, sums, strict=True):
                    moments.addmm_(units[:, place].T, units[:, place])
            done += len(shard.ids)
            yield done, total
        for moments in sums:
            _invert(moments, many, size)
            yield done, total
        first = 0
        for shard in shards:
            for _, units in _widened(shard, columns):
                lengths = torch.zeros(len(units))
                for place, inverse in zip(places, sums, strict=True):
                    part = units[:, place]
                    lengths += (part @ inverse * part).sum(1)
                scales[first : first + len(units), checkpoint] = torch.where(lengths > 0, lengths.rsqrt(), 0)
                first += len(units)
            done += len(shard.ids)
            yield done, total
        made[f"inverse.{checkpoint}"] = torch.cat([inverse.flatten() for inverse in sums])
    write(save({**made, "scales": scales}))


def _counted(shards: Sequence[Shard]) -> list[NDArray[np.bool_]]:
    """For each shard [rows]: which are counted, the last of those with the same id, unless it is flagged."""
    last = {row: (number, at) for number, shard in enumerate(shards) for at, row in enumerate(shard.ids)}
    found = []
    for number, shard in enumerate(shards):
        newest = np.array([last[row] == (number, at) for at, row in enumerate(shard.ids)], dtype=bool)
        found.append(newest & np.all(shard.norms > 0, axis=1))
    return found


def _widened(shard: Shard, columns: slice) -> Iterator[tuple[slice, torch.Tensor]]:
    """A shard's unit vectors in float32, some rows at a time, of the columns of one checkpoint."""
    step = max(1, TOGETHER // (columns.stop - columns.start))
    for start in range(0, len(shard.ids), step):
        at = slice(start, start + step)
        yield at, torch.from_numpy(shard.units(at, columns).astype(np.float32))


def _invert(moments: torch.Tensor, rows: int, size: float) -> None:
    """Make of a block's sum over rows the inverse of its damped moments, in place.

    Args:
        size: what the rows were divided by.
    """
    exact = moments.double() / max(rows, 1)
    mean = float(exact.trace()) / len(exact)
    if mean <= ROUNDING:
        moments.zero_()
        return
    exact.diagonal().add_(DAMPING * mean)
    moments.copy_(torch.cholesky_inverse(torch.linalg.cholesky(exact)) / size**2)
