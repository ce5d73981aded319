"""Per-sample projected gradients of one batch, from one backward pass in which no weight gradient is formed.

For a linear module with inputs a_s and output gradients d_s the gradient of a sample is G = sum_s d_s a_s^T
(METHODS section 2). The forward hook keeps what the sketch needs of a_s, a hook on the output's gradient meets d_s, and
the sketch sums over positions. All weights are frozen; only the embedding's output requires a gradient.

`token_scores` turns the question round: the inner product of every token's gradient with one direction is the
derivative of that token's loss along the direction, so two forward passes with each module nudged by +-eps answer for
all tokens at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from app.influence.corpus import Example
from app.influence.models import Checkpoint, LoadedModel
from app.influence.projection import ProjectionSpec, Sketch, sketch

# Size of a nudge's effect on the modules' outputs, relative to them: the error of the difference quotient falls with
# its square, float32's rounding grows with its inverse.
NUDGE = 1e-3


@dataclass(frozen=True)
class Plan:
    """The sketch of each attributed module, the vector's length, and whether each module's part is divided by its norm.

    Dividing ("layer", RapidIn) is done before modules are summed into one vector, so it is a matter of collecting.
    """

    sketches: dict[str, Sketch]
    width: int
    layer: bool


def plan_for(model: LoadedModel, spec: ProjectionSpec, normalisation: str = "none") -> Plan:
    """The sketches of all attributed modules, in the model's order; made once a model, since hashing takes a while."""
    key = (spec, normalisation)
    if key in model.plans:
        return cast(Plan, model.plans[key])
    sketches: dict[str, Sketch] = {}
    end = 0
    for module in model.attributed:
        made = sketch(spec, module.name, module.d_out, module.d_in, end).to(model.spec.device)
        sketches[module.name] = made
        end = max(end, made.place.stop)
    plan = model.plans[key] = Plan(sketches, end, normalisation == "layer")
    return plan


@dataclass(frozen=True)
class Gradients:
    """Of one batch.

    Attributes:
        vectors: [batch, width], of the mean loss over each sample's targets.
        losses: [batch][targets]
        divisors: [batch, modules], what each module's part was divided by (ones without layer normalisation).
    """

    vectors: torch.Tensor
    losses: list[torch.Tensor]
    divisors: torch.Tensor


def gradients(model: LoadedModel, checkpoint: Checkpoint, plan: Plan, examples: Sequence[Example]) -> Gradients:
    """Gradients of the samples' mean losses at a checkpoint; a sample's numbers do not depend on its batch mates."""
    with model.lock:
        modules = model.activate(checkpoint)
        capture = _Capture(model, plan, len(examples), None)
        with torch.enable_grad(), _hooked(model, dict.fromkeys(modules, capture.hook), modules, embedding=True):
            losses = target_losses(model, examples)
            torch.stack([loss.mean() for loss in losses]).sum().backward()  # a sum: never the mean over a batch
    return Gradients(capture.vectors, [loss.detach() for loss in losses], capture.divisors)


def token_gradients(
    model: LoadedModel, checkpoint: Checkpoint, plan: Plan, example: Example, divisors: torch.Tensor
) -> torch.Tensor:
    """[targets, width]: the gradient of each target's own loss, by one forward and as many backward passes.

    They average to `gradients`' vector of the example, whose `divisors` [modules] they are divided by.
    """
    rows = []
    with model.lock:
        modules = model.activate(checkpoint)
        capture = _Capture(model, plan, 1, divisors[None])
        with torch.enable_grad(), _hooked(model, dict.fromkeys(modules, capture.hook), modules, embedding=True):
            (losses,) = target_losses(model, [example])
            for number, loss in enumerate(losses):
                capture.vectors = torch.zeros_like(capture.vectors)
                loss.backward(retain_graph=number + 1 < len(losses))
                rows.append(capture.vectors[0])
    return torch.stack(rows)


def token_scores(
    model: LoadedModel,
    checkpoint: Checkpoint,
    plan: Plan,
    examples: Sequence[Example],
    directions: torch.Tensor,
    divisors: torch.Tensor,
) -> list[torch.Tensor]:
    """The inner product of each target's gradient with a direction, by two nudged forward passes.

    Args:
        examples: n examples, or one that all the directions are asked about.
        directions: [n, width]
        divisors: [n or 1, modules], what the examples' gradients are divided by.

    Returns:
        [n][targets]
    """
    directions = directions.to(model.spec.device)
    parts = {
        name: directions[:, made.place] / divisors[:, [at]] for at, (name, made) in enumerate(plan.sketches.items())
    }
    copies = list(examples) * (len(directions) if len(examples) == 1 else 1)
    sizes = torch.zeros(2, dtype=torch.float64)

    def measure(name: str, acts: torch.Tensor, output: torch.Tensor) -> None:
        nudge = plan.sketches[name].nudge(acts, parts[name])
        sizes[0] += output.double().square().sum().cpu() * (len(nudge) / len(output))
        sizes[1] += nudge.double().square().sum().cpu()

    with model.lock, torch.no_grad():
        modules = model.activate(checkpoint)
        with _hooked(model, dict.fromkeys(modules, measure), modules):
            target_losses(model, examples)
        if sizes[1] == 0:  # no direction at all: nothing changes along it
            return [torch.zeros(len(example.positions)) for example in copies]
        step = NUDGE * float((sizes[0] / sizes[1]).sqrt())

        def nudged(sign: int) -> list[torch.Tensor]:
            def hook(name: str, acts: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
                return output + plan.sketches[name].nudge(acts, parts[name]) * (sign * step)

            with _hooked(model, dict.fromkeys(modules, hook), modules):
                return target_losses(model, copies)

        return [(up - down) / (2 * step) for up, down in zip(nudged(1), nudged(-1), strict=True)]


def losses(model: LoadedModel, checkpoint: Checkpoint, examples: Sequence[Example]) -> list[torch.Tensor]:
    """The loss of each target of each example, without gradients."""
    with model.lock, torch.no_grad():
        model.activate(checkpoint)
        return target_losses(model, examples)


class _Capture:
    """Collects the projected gradients of one backward pass."""

    def __init__(self, model: LoadedModel, plan: Plan, batch: int, divisors: torch.Tensor | None) -> None:
        kind = torch.float64 if model.model.dtype == torch.float64 else torch.float32
        self.plan, self.given = plan, divisors
        self.vectors = torch.zeros(batch, plan.width, dtype=kind, device=model.spec.device)
        self.divisors = torch.ones(batch, len(plan.sketches), dtype=kind, device=model.spec.device)
        self.at = {name: at for at, name in enumerate(plan.sketches)}

    def hook(self, name: str, acts: torch.Tensor, output: torch.Tensor) -> None:
        """Called after a module's forward pass."""
        if not output.requires_grad:
            return
        made, at = self.plan.sketches[name], self.at[name]
        kept = made.keep(acts.detach().to(self.vectors.dtype))

        def backward(grads: torch.Tensor) -> None:  # [batch, seq, d_out]
            part = made.project(kept, grads.to(self.vectors.dtype))
            if self.given is not None:
                part = part / self.given[:, [at]]
            elif self.plan.layer:
                self.divisors[:, at] = part.norm(dim=1).clamp_min(torch.finfo(part.dtype).tiny)
                part = part / self.divisors[:, [at]]
            self.vectors[:, made.place] += part

        output.register_hook(backward)


Hook = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor | None]


@contextmanager
def _hooked(
    model: LoadedModel, hooks: dict[str, Hook], modules: dict[str, nn.Module], embedding: bool = False
) -> Iterator[None]:
    """Call hooks with (name, input, output) after the modules, and let gradients begin at the embedding's output."""

    def forward(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if args[0].dim() != 3:  # DoRA calls A and B on an identity matrix for a norm that it holds constant
                return None
            return hooks[name](name, args[0], output)

        return hook

    def require_grad(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_(True)

    handles = [module.register_forward_hook(forward(name)) for name, module in modules.items()]
    if embedding:
        handles.append(model.model.get_input_embeddings().register_forward_hook(require_grad))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def target_losses(model: LoadedModel, examples: Sequence[Example]) -> list[torch.Tensor]:
    """The loss of each target. The output embedding runs on the targets' positions alone."""
    length = max(len(example.ids) for example in examples)
    device = model.spec.device
    ids = torch.zeros(len(examples), length, dtype=torch.long)
    mask = torch.zeros(len(examples), length, dtype=torch.long)
    for number, example in enumerate(examples):
        ids[number, : len(example.ids)] = torch.tensor(example.ids)
        mask[number, : len(example.ids)] = 1
    places = [(number, position) for number, example in enumerate(examples) for position in example.positions]
    rows = torch.tensor([p[0] for p in places], device=device)
    columns = torch.tensor([p[1] for p in places], device=device)
    ids, mask = ids.to(device), mask.to(device)

    def at_targets(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (args[0][rows, columns - 1].unsqueeze(0),)  # logits at i - 1 predict token i

    handle = model.model.get_output_embeddings().register_forward_pre_hook(at_targets)
    try:
        output = model.model(input_ids=ids, attention_mask=mask if len(examples) > 1 else None, use_cache=False)
    finally:
        handle.remove()
    logits = output.logits[0]
    if logits.dtype != torch.float64:
        logits = logits.float()
    each = nn.functional.cross_entropy(logits, ids[rows, columns], reduction="none")
    return list(each.split([len(example.positions) for example in examples]))
