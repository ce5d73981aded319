"""What both benchmarks of valuation measure with: routes to <g_V, g_z>, free rankings, training on a part."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pools import Pool
from ranking import bm25
from rich.console import Console
from rich.table import Table
from training import train

from app.influence.building import batches
from app.influence.corpus import Example
from app.influence.gradients import losses, target_losses
from app.influence.models import LoadedModel, ModelSpec, load
from app.valuation.linfik import Direction, Normalize, Products, directional, products
from app.valuation.ranks import spearman

NORMALIZE: tuple[Normalize, ...] = ("none", "layer", "unit")
BUDGET = 1024

console = Console()
if not console.is_terminal:
    console.width = 140
Scores = dict[str, torch.Tensor]
"""By name of a ranking: [rows]."""


@contextmanager
def cpu_seconds(into: dict[str, float], name: str) -> Iterator[None]:
    began = time.process_time()
    yield
    into[name] = into.get(name, 0.0) + time.process_time() - began


def per_sample(model: LoadedModel, direction: Direction, examples: Sequence[Example]) -> torch.Tensor:
    """[rows]: <g_V, g_z> with each row's whole gradient formed by autograd, a row at a time."""
    modules = model.activate(model.checkpoints[-1])
    weights = [module.weight for module in modules.values()]
    found = []
    for weight in weights:
        weight.requires_grad_(True)
    for example in examples:
        grads = torch.autograd.grad(target_losses(model, [example])[0].mean(), weights)
        each = zip(grads, direction.parts.values(), strict=True)
        found.append(sum((grad * part).sum().double() for grad, part in each))
    model.model.requires_grad_(False)
    return torch.stack([torch.as_tensor(one) for one in found])


def routes(model: LoadedModel, direction: Direction, examples: Sequence[Example], budget: int) -> dict[str, Any]:
    """Both routes beside exact per-sample gradients: rank correlation, CPU seconds, times faster."""
    took: dict[str, float] = {}
    with cpu_seconds(took, "per-sample"):
        exact = per_sample(model, direction, examples)
    with cpu_seconds(took, "directional"):
        quick = directional(model, direction, examples, budget)
    parts: dict[str, torch.Tensor] = {}
    for name, norms in (("products", False), ("products with norms", True)):
        with cpu_seconds(took, name):
            parts[name] = one_pass(model, [direction], examples, norms=norms, budget=budget).values("none")[:, 0]
    with cpu_seconds(took, "one forward pass"):
        for batch in batches(examples, budget):
            losses(model, model.checkpoints[-1], [examples[i] for i in batch])
    found = {"directional": quick, **parts}
    return {
        "rows": len(examples),
        "tokens": sum(len(example.ids) for example in examples),
        "budget": budget,
        "cpu_seconds": took,
        "spearman": {name: spearman(values, exact) for name, values in found.items()},
        "times_faster": {name: took["per-sample"] / took[name] for name in found},
    }


def one_pass(
    model: LoadedModel,
    directions: Sequence[Direction],
    examples: Sequence[Example],
    *,
    norms: bool,
    budget: int = BUDGET,
) -> Products:
    """`products` of any number of rows."""
    many = len(model.attributed)
    dots = torch.zeros(len(examples), many, len(directions), dtype=torch.float64)
    sizes = torch.ones(len(examples), many, dtype=torch.float64)
    for batch in batches(examples, budget):
        part = products(model, directions, [examples[i] for i in batch], norms=norms)
        dots[batch], sizes[batch] = part.dots, part.norms
    return Products(dots, sizes, part.ours)


def mean_of(model: LoadedModel, examples: Sequence[Example]) -> float:
    """The mean of the rows' losses, at the last checkpoint."""
    total = 0.0
    for batch in batches(examples, BUDGET):
        found = losses(model, model.checkpoints[-1], [examples[i] for i in batch])
        total += sum(float(loss.double().mean()) for loss in found)
    return total / len(examples)


def free_rankings(pool: Pool, linfik: Products) -> Scores:
    """LinFiK's, and those that need no pass through the model."""
    texts = [[f"{row.prompt}\n{row.response}" for row in some] for some in (pool.validation, pool.rows)]
    return {
        **{f"LinFiK, {name}": linfik.values(name)[:, 0] for name in NORMALIZE},
        "BM25": bm25(*texts).mean(0),
        "random": torch.rand(len(pool.rows), generator=torch.Generator().manual_seed(0)),
    }


def quarters(values: Products, names: Sequence[Normalize], seed: int) -> dict[str, list[int]]:
    """Places of rows: the top and the bottom quarter by each normalisation, a random one, and all of them."""
    rows = len(values.dots)
    found: dict[str, list[int]] = {}
    for name in names:
        order = values.values(name)[:, 0].argsort(descending=True).tolist()
        found[f"top quarter, {name}"] = order[: rows // 4]
        found[f"bottom quarter, {name}"] = order[-(rows // 4) :]
    drawn = torch.randperm(rows, generator=torch.Generator().manual_seed(seed)).tolist()
    return found | {"random quarter": drawn[: rows // 4], "whole pool": list(range(rows))}


@dataclass(frozen=True)
class Lesson:
    """How a model is trained on a part of the pool; `steps` at which its loss is measured, the first being 0."""

    steps: tuple[int, ...]
    batch: int
    lr: float


def trained(folder: Path, how: Lesson, rows: Sequence[Example], test: Sequence[Example], seed: int) -> list[float]:
    """The test rows' loss at the lesson's steps, from the weights in the folder."""
    model = load(ModelSpec(folder))
    model.model.requires_grad_(True)
    found = [mean_of(model, test)]
    for _ in train(model.model, rows, how.steps[1:], how.batch, how.lr, seed, console):
        model.model.eval()
        found.append(mean_of(model, test))
    return found


def say_routes(name: str, told: dict[str, Any]) -> None:
    table = Table(title=f"{name}: <g_V, g_z> of {told['rows']} rows, {told['tokens']} tokens, CPU seconds")
    for column in ("route", "CPU seconds", "times faster than per-sample", "Spearman with it"):
        table.add_column(column, justify="left" if column == "route" else "right")
    for route, seconds in told["cpu_seconds"].items():
        fast, same = told["times_faster"].get(route), told["spearman"].get(route)
        cells = [f"{fast:.1f}" if fast else "", f"{same:.5f}" if same else ""]
        table.add_row(route, f"{seconds:.2f}", *cells)
    console.print(table)
