"""LinFiK's values out of an index of the pool, without a pass over it.

The validation direction is projected as the rows were, and multiplied with their vectors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from app.influence.corpus import Row, Template
from app.influence.errors import SpecError
from app.influence.gradients import plan_for
from app.influence.index import Index
from app.influence.models import LoadedModel
from app.valuation.linfik import Direction, Normalize


class Settings(Protocol):
    """What of a valuation's settings the index must share."""

    @property
    def normalize(self) -> Normalize:
        """Of the values."""

    @property
    def template(self) -> Template:
        """By which rows are rendered."""

    @property
    def max_length(self) -> int:
        """Tokens."""


def indexed_values(
    index: Index, model: LoadedModel, directions: Sequence[Direction], rows: Sequence[Row], spec: Settings
) -> NDArray[np.float64]:
    """[rows, directions]: the values up to the projection's error; NaN for rows that the index flagged.

    Of several checkpoints the last one's vectors count, as everywhere in valuation.

    Raises:
        SpecError: the index lacks candidates, or was collected with another normalisation, template or limit.
    """
    kept = index.manifest.index_spec
    wanted = "layer" if spec.normalize == "layer" else "none"
    if kept.normalisation != wanted:
        detail = f"values with normalize '{spec.normalize}' need an index with normalisation '{wanted}'"
        raise SpecError(detail, field="index")
    if (kept.template, kept.max_length) != (spec.template, spec.max_length):
        raise SpecError("the index was built with another template or max_length", field="index")
    there = {row for shard in index.shards for row, live in zip(shard.ids, shard.kept, strict=True) if live}
    missing = sum(row.id not in there for row in rows)
    if missing:
        raise SpecError(f"the index lacks {missing} of the candidates: add them to it first", field="index")
    plan, last = plan_for(model, kept.projection, kept.normalisation), len(model.checkpoints) - 1
    vectors = torch.zeros(len(directions), len(model.checkpoints) * plan.width)
    for number, direction in enumerate(directions):
        vector = vectors[number, last * plan.width :]
        for at, module in enumerate(model.attributed):
            made = plan.sketches[module.name]
            inputs = torch.eye(module.d_in, device=direction.parts[module.name].device)[None]  # D = sum_s (D e_s) e_s^T
            part = made.project(made.keep(inputs), direction.parts[module.name].float().T[None])[0].cpu()
            scale = float(direction.norms[at]) * len(model.attributed) if spec.normalize == "layer" else 1.0
            vector[made.place] += part / max(scale, torch.finfo(torch.float32).tiny)
        if spec.normalize == "unit":
            vector /= direction.norm
    scores = index.scores(vectors, "unit" if spec.normalize == "unit" else "none").double().numpy()
    place = {row: at for at, row in enumerate(index.ids)}
    found = np.full((len(rows), len(directions)), np.nan)
    live = [(at, place[row.id]) for at, row in enumerate(rows) if row.id in place]
    if live:
        ours, theirs = (list(side) for side in zip(*live, strict=True))
        found[ours] = scores[:, theirs].T
    return found
