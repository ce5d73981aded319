"""Inner products of an example's token gradients with directions, by whichever of two routes costs less.

A backward pass for each token, or two forward passes for each direction with the modules nudged along it (METHODS,
section 2). A backward pass costs about two forward passes, so the modules are nudged when there are fewer directions
than tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from app.influence.corpus import Example
from app.influence.gradients import Plan, token_gradients, token_scores
from app.influence.models import Checkpoint, LoadedModel

Route = Literal["backwards", "nudges"]
NUDGE_ERROR = 0.02  # of the largest score
NUDGED_TOKENS = 2048  # tokens in one nudged forward pass


@dataclass(frozen=True)
class TrainToken:
    """A token of a training row's response and its share of the row's score."""

    text: str
    score: float


def texts_of(row: Example) -> list[str]:
    """The targets' texts; a character of several tokens is shown by the first."""
    texts, shown = [], 0
    for position in row.positions:
        start, end = row.offsets[position]
        texts.append(row.text[max(start, shown) : end])
        shown = max(shown, end)
    return texts


def token_products(
    model: LoadedModel,
    plan: Plan,
    example: Example,
    divisors: Sequence[torch.Tensor],
    directions: torch.Tensor,
    known: Sequence[float],
) -> tuple[torch.Tensor, Route]:
    """The inner products [targets, n] of an example's token gradients with directions [n, checkpoints * width].

    `known` are those of the example's own gradient, to which the tokens' must average. Where they do not (the model
    bends too much within the nudge for a difference quotient), the exact route is taken.

    Args:
        divisors: [checkpoint][modules] of the example's gradient.
    """
    parts = list(zip(model.checkpoints, divisors, directions.split(plan.width, 1), strict=True))
    exact = torch.tensor(known)
    scores = torch.zeros(len(example.positions), len(directions))
    if len(directions) < len(example.positions) and model.model.dtype in (torch.float32, torch.float64):
        scores = sum((_nudged(model, plan, c, example, d, part) for c, d, part in parts), scores)
        if bool(((scores.mean(0) - exact).abs() <= NUDGE_ERROR * scores.abs().amax(0)).all()):
            return scores, "nudges"
    each = (token_gradients(model, c, plan, example, d, part).float().cpu() for c, d, part in parts)
    return sum(each, torch.zeros_like(scores)), "backwards"


def _nudged(
    model: LoadedModel,
    plan: Plan,
    checkpoint: Checkpoint,
    example: Example,
    divisors: torch.Tensor,
    directions: torch.Tensor,
) -> torch.Tensor:
    """[targets, n], so many directions at a time as a pass has room for."""
    many = max(1, NUDGED_TOKENS // len(example.ids))
    parts = [token_scores(model, checkpoint, plan, example, divisors, part) for part in directions.split(many)]
    return torch.cat(parts, 1).float().cpu()
