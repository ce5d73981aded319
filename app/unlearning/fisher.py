"""Selective synaptic dampening (Foster et al., 2024): weights that matter more to the forget rows than to all shrink.

A weight's importance to some rows is the mean of its squared gradients, a row at a time (the diagonal of the empirical
Fisher information of the rows' mean losses). A weight of importance F to the forget rows and D to all rows is selected
where F > selection x D, and then multiplied by min(dampening x D / F, 1). Nothing is trained. In the paper the weights
are the whole model's and D is of all training rows; here they are the adapter's, and D is of the rows that are given.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from app.influence.corpus import Example
from app.influence.errors import SpecError
from app.influence.gradients import target_losses
from app.influence.index import write_file
from app.influence.models import LoadedModel
from app.unlearning.adapter import Adapter, Weights


def dampened(
    weights: Mapping[str, torch.Tensor],
    forget: Mapping[str, torch.Tensor],
    everything: Mapping[str, torch.Tensor],
    *,
    selection: float,
    dampening: float,
) -> Weights:
    """The weights after selection and dampening; `forget` and `everything` are importances of the same shapes."""
    found = {}
    for name, weight in weights.items():
        mine, all_rows = forget[name], everything[name]
        factor = (dampening * all_rows / mine.clamp_min(torch.finfo(mine.dtype).tiny)).clamp_max(1.0)
        found[name] = torch.where(mine > selection * all_rows, weight * factor.to(weight.dtype), weight)
    return found


class Importances:
    """Of the adapter's weights to two groups of rows, summed a row at a time; what is done is kept in a file."""

    def __init__(
        self, model: LoadedModel, adapter: Adapter, groups: Sequence[Sequence[Example]], file: Path, plan: str
    ) -> None:
        self.model, self.adapter, self.groups, self.file, self.plan = model, adapter, groups, file, plan
        self.sums = [{n: torch.zeros_like(w, dtype=torch.float32) for n, w in adapter.first.items()} for _ in groups]
        self.losses: list[float] = []

    @property
    def total(self) -> int:
        """Rows in all."""
        return sum(map(len, self.groups))

    def run(self, keep_every: int) -> Iterator[int]:
        """Add the rows that an earlier run has not, one at a time; yields how many are done."""
        self._restore()
        self.model.model.eval()
        owners = [(group, example) for group, examples in enumerate(self.groups) for example in examples]
        for done, (group, example) in enumerate(owners[len(self.losses) :], start=len(self.losses) + 1):
            loss = target_losses(self.model, [example])[0].mean()
            found = torch.autograd.grad(loss, list(self.adapter.weights.values()))
            for name, gradient in zip(self.adapter.weights, found, strict=True):
                self.sums[group][name] += gradient.float().square()
            self.losses.append(float(loss.detach()))
            if done % keep_every == 0 or done == self.total:
                self._keep()
            yield done

    def means(self) -> tuple[Weights, Weights]:
        """Importance to the first group and to all rows."""
        first = {name: each / len(self.groups[0]) for name, each in self.sums[0].items()}
        together = {name: sum(sums[name] for sums in self.sums) / self.total for name in first}
        return first, {name: torch.as_tensor(each) for name, each in together.items()}

    def _keep(self) -> None:
        state = {f"{group}.{name}": each.cpu() for group, sums in enumerate(self.sums) for name, each in sums.items()}
        write_file(self.file, save(state, {"losses": json.dumps(self.losses), "spec": self.plan}))

    def _restore(self) -> None:
        if not self.file.is_file():
            return
        with safe_open(self.file, "pt") as opened:
            told = opened.metadata()
        if told["spec"] != self.plan:
            raise SpecError("the folder holds a run with other settings", field="spec")
        self.losses = json.loads(told["losses"])
        state = load_file(self.file)
        for group, sums in enumerate(self.sums):
            for name, each in sums.items():
                each.copy_(state[f"{group}.{name}"])
