"""What is measured of a model, a number for each row, by teacher forcing: one batched forward pass and no decoding.

* loss: mean cross-entropy of the response's tokens, in nats.
* accuracy: share of the response's tokens that are the model's first choice.
* written: 1 if each of the response's first `OPENING` tokens (or all, if they are fewer) is the model's first choice
  after the prompt and the tokens before it, which is to say that greedy decoding writes them; else 0.
* probability: the geometric mean of its tokens' probabilities, exp(-loss).
* divergence: mean over the response's positions of KL(reference || model), in nats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch.nn import functional

from app.influence.building import batches
from app.influence.corpus import Example
from app.influence.gradients import target_logits
from app.influence.models import LoadedModel

OPENING = 8
BUDGET = 1024
"""Padded tokens a batch."""
Numbers = dict[str, list[float]]
"""By name, a number for each row."""
State = dict[str, Numbers]
"""By group of rows."""


class Reference(Protocol):
    """Makes the model another one for a while."""

    def __call__(self) -> AbstractContextManager[None]:
        """For the length of a `with`."""


def measure(model: LoadedModel, groups: Mapping[str, Sequence[Example]], into: State) -> Iterator[int]:
    """Loss, accuracy, written and probability of each row of each group; yields how many rows are new."""
    for group, examples in groups.items():
        rows: list[tuple[float, ...]] = [()] * len(examples)
        for batch in batches(examples, BUDGET):
            rows_of = [examples[at] for at in batch]
            with torch.no_grad():
                logits, tokens = target_logits(model, rows_of)
                losses = functional.cross_entropy(logits, tokens, reduction="none")
                right = logits.argmax(1) == tokens
            many = [len(example.positions) for example in rows_of]
            for at, loss, hits in zip(batch, losses.split(many), right.split(many), strict=True):
                mean = loss.double().mean()
                written = hits[:OPENING].all()
                rows[at] = (float(mean), float(hits.double().mean()), float(written), float((-mean).exp()))
            yield len(batch)
        columns = list(zip(*rows, strict=True)) or [()] * 4
        names = ("loss", "accuracy", "written", "probability")
        into[group] = {name: list(column) for name, column in zip(names, columns, strict=True)}


def divergence(
    model: LoadedModel, examples: Sequence[Example], reference: Reference, into: list[float]
) -> Iterator[int]:
    """KL(reference || model) of each row; both are asked for the same batches. Yields how many rows are done."""
    done = 0
    for batch in batches(examples, BUDGET // 2):
        rows = [examples[at] for at in batch]
        with torch.no_grad():
            with reference():
                expected = target_logits(model, rows)[0].log_softmax(1)
            now = target_logits(model, rows)[0].log_softmax(1)
            each = (expected.exp() * (expected - now)).sum(1).double()
        for at, one in zip(batch, each.split([len(example.positions) for example in rows]), strict=True):
            into[at] = float(one.mean())
        done += len(batch)
        yield done
