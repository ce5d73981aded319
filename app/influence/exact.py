"""Gradients that are not projected: the same hooks, with every coordinate of a module's weight in the vector.

A vector is as long as the attributed weights together, so only a few are ever held: those of queries, and of the rows
whose token scores are wanted. What is asked of many rows are their inner products with a few directions and their
norms, and those are summed where a module's output gradient meets its input, one module and a few rows at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from app.influence.corpus import Example
from app.influence.gradients import Plan, hooked, target_losses
from app.influence.models import Checkpoint, LoadedModel
from app.influence.projection import Sketch

ROOM = 2**24  # numbers of one module's gradients that are formed at a time (64 MiB)


@dataclass
class Whole:
    """No projection: G itself, row by row."""

    shape: tuple[int, int]  # (d_out, d_in)
    place: slice

    def to(self, device: torch.device) -> Whole:
        """The same everywhere: it holds no numbers."""
        return self

    def keep(self, acts: torch.Tensor) -> torch.Tensor:
        """All of it."""
        return acts

    def project(self, kept: torch.Tensor, grads: torch.Tensor) -> torch.Tensor:
        """[batch, d_out * d_in]"""
        return torch.einsum("bso,bsi->boi", grads, kept).flatten(1)

    def nudge(self, acts: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        """D a_s"""
        nudged: torch.Tensor = acts @ directions.to(acts).unflatten(1, self.shape).transpose(1, 2)
        return nudged


def whole_plan(model: LoadedModel, normalisation: str = "none") -> Plan:
    """The attributed modules' weights side by side, in the model's order."""
    key = ("whole", normalisation)
    if key not in model.plans:
        sketches: dict[str, Sketch] = {}
        end = 0
        for module in model.attributed:
            size = module.d_out * module.d_in
            sketches[module.name] = Whole((module.d_out, module.d_in), slice(end, end + size))
            end += size
        model.plans[key] = Plan(sketches, end, normalisation == "layer")
    return cast(Plan, model.plans[key])


def formed(acts: torch.Tensor, grads: torch.Tensor) -> Iterator[torch.Tensor]:
    """The gradients G of a batch's rows, [rows, d_out, d_in], a few rows at a time.

    Args:
        acts: [batch, seq, d_in]
        grads: [batch, seq, d_out]
    """
    many = max(1, ROOM // (acts.shape[2] * grads.shape[2]))
    for a, d in zip(acts.split(many), grads.split(many), strict=True):
        yield d.transpose(1, 2) @ a


@dataclass(frozen=True)
class Lens:
    """A module's part of an inner product: the sum over coordinates of weights x (Q_out^T X Q_in) (Q_out^T Y Q_in)."""

    q_out: torch.Tensor  # [d_out, d_out]
    q_in: torch.Tensor  # [d_in, d_in]
    weights: torch.Tensor  # [d_out, d_in]

    def turn(self, matrices: torch.Tensor) -> torch.Tensor:
        """Matrices [n, d_out, d_in] in the bases, weighted: what meets another one's coordinates there."""
        turned: torch.Tensor = (self.q_out.T @ matrices @ self.q_in) * self.weights
        return turned

    def apply(self, matrices: torch.Tensor) -> torch.Tensor:
        """What meets another one's plain coordinates: (F + lambda)^-1 of matrices [n, d_out, d_in]."""
        applied: torch.Tensor = self.q_out @ self.turn(matrices) @ self.q_in.T
        return applied


Lenses = Mapping[str, Lens]
"""By module; none: the plain inner product."""


def through(vectors: torch.Tensor, plan: Plan, lenses: Lenses, turned: bool = False) -> torch.Tensor:
    """[n, width]: what `Lens.apply` (or `Lens.turn`) makes of each module's part of vectors."""
    found = torch.empty_like(vectors) if lenses else vectors
    for name, lens in lenses.items():
        place = plan.sketches[name].place
        matrices = vectors[:, place].unflatten(1, (len(lens.q_out), len(lens.q_in))).to(lens.q_out)
        found[:, place] = (lens.turn if turned else lens.apply)(matrices).flatten(1).to(vectors)
    return found


@dataclass(frozen=True)
class Products:
    """Of a batch of rows: inner products [rows, n] with the directions, and the rows' norms [rows]; float64."""

    dots: torch.Tensor
    norms: torch.Tensor


def products(
    model: LoadedModel,
    checkpoint: Checkpoint,
    plan: Plan,
    directions: torch.Tensor,
    examples: Sequence[Example],
    lenses: Lenses,
) -> Products:
    """Inner products of the gradients of rows' mean losses, by one forward and one backward pass.

    Args:
        plan: of whole gradients; it says whether a module's part is divided by its norm.
        directions: [n, width], turned by the lenses if there are any.
        lenses: what the rows' norms are measured by.
    """
    found = _Collector(model, plan, directions, len(examples), lenses)
    with model.lock:
        modules = model.activate(checkpoint)
        with torch.enable_grad(), hooked(model, modules, found.hook):
            losses = target_losses(model, examples)
            torch.stack([loss.mean() for loss in losses]).sum().backward()  # a sum: never the mean over a batch
    return Products(found.dots.cpu(), found.squares.clamp_min(0).sqrt().cpu())


class _Collector:
    """Sums over modules; a module's gradients are formed for a few rows, and gone."""

    def __init__(self, model: LoadedModel, plan: Plan, directions: torch.Tensor, rows: int, lenses: Lenses) -> None:
        self.plan, self.directions, self.lenses = plan, directions, lenses
        self.kind = torch.float64 if model.model.dtype == torch.float64 else torch.float32
        self.dots = torch.zeros(rows, len(directions), dtype=torch.float64, device=model.device)
        self.squares = torch.zeros(rows, dtype=torch.float64, device=model.device)

    def hook(self, name: str, acts: torch.Tensor, output: torch.Tensor) -> None:
        """Called after a module's forward pass."""
        acts = acts.detach().to(self.kind)  # [batch, seq, d_in]
        lens = self.lenses.get(name)
        if lens is not None:
            acts = acts @ lens.q_in.to(acts)
        wanted = self.directions[:, self.plan.sketches[name].place].to(acts)  # [n, d_out * d_in]

        def backward(grads: torch.Tensor) -> None:
            grads = grads.reshape(*acts.shape[:2], -1).to(self.kind)  # [batch, seq, d_out]
            if lens is not None:
                grads = grads @ lens.q_out.to(grads)
            start = 0
            for matrices in formed(acts, grads):
                vectors = matrices.flatten(1)  # [rows, d_out * d_in]
                dots = (vectors @ wanted.T).double()
                squares = vectors.square()
                if lens is not None:
                    squares = squares * lens.weights.to(squares).flatten()
                squares = squares.sum(1).double()
                if self.plan.layer:
                    lengths = squares.sqrt().clamp_min(torch.finfo(self.kind).tiny)
                    dots, squares = dots / lengths[:, None], (squares > 0).double()
                place = slice(start, start + len(matrices))
                self.dots[place] += dots.to(self.dots.device)
                self.squares[place] += squares.to(self.squares.device)
                start += len(matrices)

        output.register_hook(backward)
