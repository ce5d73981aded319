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
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from app.influence.corpus import Example
from app.influence.errors import SpecError
from app.influence.gradients import target_losses
from app.influence.index import write_file
from app.influence.models import LoadedModel
from app.unlearning.adapter import Adapter, Weights

ROWS = 16
BUDGET = 1024
"""The most rows of a batch, and the most padded tokens."""


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
        known = {module: name for name, module in adapter.peft.named_modules()}
        self._names = {module: f"{known[module]}.weight" for module in model.activate(model.checkpoints[-1]).values()}
        for weight in adapter.weights.values():
            weight.requires_grad_(True)  # which activating the adapter took away

    @property
    def total(self) -> int:
        """Rows in all."""
        return sum(map(len, self.groups))

    def run(self, keep_every: int) -> Iterator[int]:
        """Add the rows that an earlier run has not, a batch at a time; yields how many are done.

        Batches end where a group does and where the sums are kept, so that a killed run adds the same numbers in the
        same order as an unbroken one.
        """
        self._restore()
        self.model.model.eval()
        while len(self.losses) < self.total:
            done = len(self.losses)
            group, examples = self._next(done, keep_every)
            with torch.enable_grad():
                squares, losses = self._squares(examples)
            for name, square in squares.items():
                self.sums[group][name] += square
            self.losses += losses
            done = len(self.losses)
            if done % keep_every == 0 or done == self.total:
                self._keep()
            yield done

    def _next(self, done: int, keep_every: int) -> tuple[int, Sequence[Example]]:
        """The group and the rows of the next batch."""
        group = 0
        while done >= len(self.groups[group]):
            done, group = done - len(self.groups[group]), group + 1
        most = min(ROWS, keep_every - len(self.losses) % keep_every) if self._batched else 1
        examples = self.groups[group][done : done + most]
        while len(examples) > 1 and len(examples) * max(len(example.ids) for example in examples) > BUDGET:
            examples = examples[:-1]
        return group, examples

    @property
    def _batched(self) -> bool:
        """Whether each weight is that of a linear module that sees every position of every row once."""
        return set(self.adapter.weights) == set(self._names.values())

    def _squares(self, examples: Sequence[Example]) -> tuple[Weights, list[float]]:
        """By weight, the sum over rows of its squared gradients; and the rows' losses.

        Of a linear module a row's gradient is sum_s d_s a_s^T, from the module's inputs a and its outputs' gradients d.
        """
        found: Weights = {}

        def forward(name: str) -> Any:
            def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
                acts = args[0].detach().float().reshape(len(examples), -1, args[0].shape[-1])  # [batch, seq, d_in]

                def backward(grads: torch.Tensor) -> None:
                    out = grads.float().reshape(len(examples), -1, grads.shape[-1])  # [batch, seq, d_out]
                    found[name] = torch.einsum("bso,bsi->boi", out, acts).square().sum(0)

                output.register_hook(backward)

            return hook

        many = len(examples) > 1
        handles = [module.register_forward_hook(forward(name)) for module, name in self._names.items() if many]
        try:
            losses = torch.stack([each.mean() for each in target_losses(self.model, examples)])
            exact = torch.autograd.grad(losses.sum(), list(self.adapter.weights.values()))
        finally:
            for handle in handles:
                handle.remove()
        if not many:
            found = {name: g.float().square() for name, g in zip(self.adapter.weights, exact, strict=True)}
        return found, losses.tolist()

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
