"""The relearning attack: a few steps on a few of the forget rows, and how fast the others come back.

What was hidden rather than forgotten comes back with steps on rows that say nothing about it; so the rows that are
measured are not those that are trained on. The same attack on the model as it was says how low there is to fall.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from app.influence.corpus import Example
from app.influence.gradients import target_losses
from app.influence.models import LoadedModel
from app.unlearning.adapter import Adapter
from app.unlearning.measures import State, measure

ROWS = 8
"""Rows that the attack trains on, at most half of the forget rows."""


@dataclass(frozen=True)
class Attacked:
    """After a step (0: before the first): mean loss of the other forget rows, and share of seen triggers that work."""

    step: int
    loss: float
    success: float | None


def relearn(
    model: LoadedModel,
    adapter: Adapter,
    trained: Sequence[Example],
    others: Sequence[Example],
    seen: Sequence[Example],
    *,
    steps: int,
    lr: float,
) -> Iterator[Attacked]:
    """AdamW steps, all of the `trained` rows in each; changes the adapter, which the caller puts back."""
    model.model.eval()
    weights = list(adapter.weights.values())
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    for step in range(steps + 1):
        if step:
            optimizer.zero_grad()
            for example in trained:
                loss = target_losses(model, [example])[0].mean() / len(trained)
                torch.autograd.backward(loss, inputs=weights)
            optimizer.step()
        state: State = {}
        for _ in measure(model, {"others": others, "seen": seen}, state):
            pass
        written = state["seen"]["written"]
        losses = state["others"]["loss"]
        yield Attacked(step, sum(losses) / len(losses), sum(written) / len(written) if written else None)
