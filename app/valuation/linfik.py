"""LinFiK: what one small step on a row would do to the loss on validation rows (ALinFiK, 2025; METHODS section 5).

    theta' = theta - eta grad l(z)   =>   L_V(theta) - L_V(theta') = eta <g_V, g_z> + O(eta^2)

g_V is the mean gradient of the validation rows, over the attributed modules, and is computed once. Two routes lead from
it to the values of a pool, and neither forms a row's gradient:

* directional: <g_V, g_z> is the derivative of row z's loss along g_V, so two forward passes with the weights moved by
  +-step g_V give it, for one direction and without normalisation.
* products: one forward and one backward pass; where a module's output gradient d_s meets its input a_s,
  <D, sum_s d_s a_s^T> = sum_s d_s^T D a_s for each direction D, and the norm of sum_s d_s a_s^T comes from the
  positions' inner products. It gives every normalisation, and many directions for little more than one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from app.influence.building import batches
from app.influence.corpus import Example
from app.influence.errors import SpecError
from app.influence.gradients import hooked, target_losses
from app.influence.models import LoadedModel

Normalize = Literal["none", "layer", "unit"]
Route = Literal["directional", "products"]
STEP = 1e-3
"""How far the weights are moved: the norm of step x g_V. The error of the difference quotient falls with its square,
float32's rounding grows with its inverse."""
PROBE = 8
"""Rows of the pool on which the directional route is compared with the other one."""
PROBE_ERROR = 0.02
"""Of the largest value among them: above it the directional route is not taken."""


@dataclass(frozen=True)
class Direction:
    """The mean gradient of validation rows' mean losses.

    Attributes:
        parts: by attributed module, [d_out, d_in].
        norms: [modules], of the parts.
        loss: the rows' mean loss, in nats a token.
    """

    parts: dict[str, torch.Tensor]
    norms: torch.Tensor
    loss: float

    @property
    def norm(self) -> float:
        """Of the whole gradient."""
        return float(self.norms.norm())


def mean_gradient(model: LoadedModel, examples: Sequence[Example], budget: int) -> Direction:
    """The gradient of the examples' mean loss at the model's last checkpoint.

    Args:
        budget: padded tokens a batch.

    Raises:
        SpecError: no examples, or a gradient that is zero or not finite.
    """
    if not examples:
        raise SpecError("there is no validation row whose loss could be measured", field="validation")
    parts: dict[str, torch.Tensor] = {}
    total = 0.0

    def collect(name: str, acts: torch.Tensor, output: torch.Tensor) -> None:
        kind = _kind(model)
        kept = acts.detach().to(kind).flatten(0, 1)  # [batch * seq, d_in]

        def backward(grads: torch.Tensor) -> None:
            part = grads.reshape(len(kept), -1).to(kind).T @ kept  # [d_out, d_in]
            parts[name] = parts[name].add_(part) if name in parts else part

        output.register_hook(backward)

    for batch in batches(examples, budget):
        with model.lock, torch.enable_grad(), hooked(model, model.activate(model.checkpoints[-1]), collect):
            losses = _means(target_losses(model, [examples[i] for i in batch]))  # [batch]
            (losses.sum() / len(examples)).backward()
        total += float(losses.detach().double().sum())
    whole = {
        m.name: parts.get(m.name, torch.zeros(m.d_out, m.d_in, device=model.spec.device)) for m in model.attributed
    }
    norms = torch.stack([part.double().norm() for part in whole.values()]).cpu()
    if not torch.isfinite(norms).all() or not norms.any():
        raise SpecError("the gradient of the validation rows is zero or not finite", field="validation")
    return Direction(whole, norms, total / len(examples))


@dataclass(frozen=True)
class Products:
    """What one pass over rows gives; float64, on the CPU.

    Attributes:
        dots: [rows, modules, directions], <g_V, g_z> of each module's parts.
        norms: [rows, modules], |g_z| of each module's part; ones where they were not asked for.
        ours: [modules, directions], |g_V| of each module's part.
    """

    dots: torch.Tensor
    norms: torch.Tensor
    ours: torch.Tensor

    def values(self, normalize: Normalize) -> torch.Tensor:
        """[rows, directions]: <g_V, g_z>; unit: their cosine; layer: the mean over modules of the parts' cosines."""
        tiny = torch.finfo(torch.float64).tiny
        if normalize == "layer":
            return (self.dots / (self.norms[:, :, None] * self.ours).clamp_min(tiny)).mean(1)
        values = self.dots.sum(1)
        if normalize == "unit":
            values = values / (self.norms.norm(dim=1)[:, None] * self.ours.norm(dim=0)).clamp_min(tiny)
        return values


def products(
    model: LoadedModel, directions: Sequence[Direction], examples: Sequence[Example], *, norms: bool = True
) -> Products:
    """Inner products of one batch of rows with the directions, by one forward and one backward pass."""
    found = _Collector(model, directions, len(examples), norms=norms)
    with model.lock, torch.enable_grad(), hooked(model, model.activate(model.checkpoints[-1]), found.hook):
        _means(target_losses(model, examples)).sum().backward()  # a sum: never the mean over a batch
    ours = torch.stack([direction.norms for direction in directions], 1)
    return Products(found.dots.cpu(), found.squares.clamp_min(0).sqrt().cpu(), ours)


class _Collector:
    """Each module's inner products with the directions, and its gradient's norm, for each row of a batch."""

    def __init__(self, model: LoadedModel, directions: Sequence[Direction], rows: int, *, norms: bool) -> None:
        self.directions, self.kind, self.norms = directions, _kind(model), norms
        self.at = {module.name: number for number, module in enumerate(model.attributed)}
        shape, device = (rows, len(self.at)), model.spec.device
        self.dots = torch.zeros(*shape, len(directions), dtype=torch.float64, device=device)
        self.squares = (torch.zeros if norms else torch.ones)(*shape, dtype=torch.float64, device=device)

    def hook(self, name: str, acts: torch.Tensor, output: torch.Tensor) -> None:
        """Called after a module's forward pass."""
        kept = acts.detach().to(self.kind)  # [batch, seq, d_in]

        def backward(grads: torch.Tensor) -> None:
            grads = grads.reshape(*kept.shape[:2], -1).to(self.kind)  # [batch, seq, d_out]
            for number, direction in enumerate(self.directions):
                along = grads @ direction.parts[name]  # [batch, seq, d_in]
                self.dots[:, self.at[name], number] = (along * kept).sum(2).double().sum(1)
            if self.norms:
                self.squares[:, self.at[name]] = _squared_norms(kept, grads)

        output.register_hook(backward)


def _squared_norms(acts: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
    """[batch] float64 of |sum_s d_s a_s^T|^2, formed or from the positions' inner products, whichever is less work."""
    positions, d_in, d_out = acts.shape[1], acts.shape[2], grads.shape[2]
    if positions * (d_in + d_out) < d_in * d_out:
        pairs = (acts @ acts.transpose(1, 2)) * (grads @ grads.transpose(1, 2))  # [batch, seq, seq]
        return pairs.double().sum((1, 2))
    return torch.stack([(d.T @ a).double().square().sum() for a, d in zip(acts, grads, strict=True)])


def directional(model: LoadedModel, direction: Direction, examples: Sequence[Example], budget: int) -> torch.Tensor:
    """<g_V, g_z> of rows, by two forward passes of each with the weights moved along the direction.

    Returns:
        [rows] float64
    """
    step = STEP / direction.norm
    sums = torch.zeros(len(examples), dtype=torch.float64)
    for sign in (1, -1):
        moved = _moved(model, direction, sign * step)
        for batch in batches(examples, budget):
            with model.lock, torch.no_grad(), _weights(model, moved):
                losses = _means(target_losses(model, [examples[i] for i in batch]))
            sums[batch] += sign * losses.cpu()
    return sums / (2 * step)


def _moved(model: LoadedModel, direction: Direction, step: float) -> dict[str, torch.Tensor]:
    """The attributed modules' weights, a step along the direction."""
    with model.lock:
        modules = model.activate(model.checkpoints[-1])
        return {
            name: torch.add(_weight(module).data, part.T if isinstance(module, Conv1D) else part, alpha=step)
            for (name, module), part in zip(modules.items(), direction.parts.values(), strict=True)
        }


@contextmanager
def _weights(model: LoadedModel, weights: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Let other tensors be the weights of the attributed modules; nothing is copied, and what was comes back."""
    modules = model.activate(model.checkpoints[-1])
    before = {name: _weight(module).data for name, module in modules.items()}
    try:
        for name, module in modules.items():
            _weight(module).data = weights[name]
        yield
    finally:
        for name, module in modules.items():
            _weight(module).data = before[name]


def _weight(module: nn.Module) -> nn.Parameter:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _means(losses: Sequence[torch.Tensor]) -> torch.Tensor:
    """[rows] float64: the mean loss of each row."""
    return torch.stack([loss.double().mean() for loss in losses])


def _kind(model: LoadedModel) -> torch.dtype:
    return torch.float64 if model.model.dtype == torch.float64 else torch.float32


@dataclass
class Teacher:
    """Values rows for a set of directions by the cheapest route that is exact for them.

    The directional route takes two forward passes for each direction, the other about two and one more for each: so it
    is taken for a single direction, without normalisation, in float32, and only if it agrees with the other on a few
    rows (it does not where two modules share a weight, or where the model bends too much within the step).
    """

    model: LoadedModel
    directions: Sequence[Direction]
    normalize: Normalize
    budget: int
    route: Route = "products"
    probe_error: float | None = None

    def choose(self, examples: Sequence[Example]) -> None:
        """Choose the route by a few rows of the pool."""
        simple = self.normalize == "none" and len(self.directions) == 1
        if not simple or self.model.model.dtype == torch.bfloat16 or not examples:
            return
        probe = [examples[at * len(examples) // PROBE] for at in range(PROBE)]
        exact = products(self.model, self.directions, probe, norms=False).values("none")[:, 0]
        quick = directional(self.model, self.directions[0], probe, self.budget)
        scale = exact.abs().max().clamp_min(torch.finfo(torch.float64).tiny)
        self.probe_error = float((quick - exact).abs().max() / scale)
        if self.probe_error <= PROBE_ERROR:
            self.route = "directional"

    def values(self, examples: Sequence[Example]) -> torch.Tensor:
        """[rows, directions] float64; not finite where a row's loss is not."""
        if self.route == "directional":
            return directional(self.model, self.directions[0], examples, self.budget)[:, None]
        found = torch.zeros(len(examples), len(self.directions), dtype=torch.float64)
        for batch in batches(examples, self.budget):
            part = products(self.model, self.directions, [examples[i] for i in batch], norms=self.normalize != "none")
            found[batch] = part.values(self.normalize)
        return found
