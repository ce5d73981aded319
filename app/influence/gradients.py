"""Per-sample projected gradients of one batch, from one backward pass in which no weight gradient is formed.

For a linear module with inputs a_s and output gradients d_s the gradient of a sample is G = sum_s d_s a_s^T
(METHODS section 2). The forward hook keeps what the sketch needs of a_s, a hook on the output's gradient meets d_s, and
the sketch sums over positions. All weights are frozen; gradients begin at the outputs of the first attributed modules.

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
from app.influence.models import Checkpoint, LoadedModel, whole_sequence
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
    devices = model.devices()
    sketches: dict[str, Sketch] = {}
    end = 0
    for module in model.attributed:
        made = sketch(spec, module.name, module.d_out, module.d_in, end).to(devices[module.name])
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
        with torch.enable_grad(), hooked(model, modules, capture.hook):
            losses = target_losses(model, examples)
            # The gradient of the sum of each row's mean (never the mean over a batch), in two nodes whatever the batch.
            shares = torch.cat([torch.full_like(loss, 1 / len(loss)) for loss in losses])
            torch.cat(losses).backward(shares)
    return Gradients(capture.vectors, [loss.detach() for loss in losses], capture.divisors)


def token_gradients(
    model: LoadedModel,
    checkpoint: Checkpoint,
    plan: Plan,
    example: Example,
    divisors: torch.Tensor,
    directions: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of each target's own loss, by one forward and as many backward passes.

    They average to `gradients`' vector of the example, whose `divisors` [modules] they are divided by.

    Args:
        directions: [n, width]; with them only the inner products are kept, not the vectors.

    Returns:
        [targets, width], or [targets, n]
    """
    rows = []
    with model.lock:
        modules = model.activate(checkpoint)
        capture = _Capture(model, plan, 1, divisors[None])
        if directions is not None:
            directions = directions.to(capture.vectors)
        with torch.enable_grad(), hooked(model, modules, capture.hook):
            (losses,) = target_losses(model, [example])
            for number, loss in enumerate(losses):
                capture.vectors = torch.zeros_like(capture.vectors)
                loss.backward(retain_graph=number + 1 < len(losses))
                vector = capture.vectors[0]
                rows.append(vector if directions is None else directions @ vector)
    return torch.stack(rows)


def token_scores(
    model: LoadedModel,
    checkpoint: Checkpoint,
    plan: Plan,
    example: Example,
    divisors: torch.Tensor,
    directions: torch.Tensor,
) -> torch.Tensor:
    """`token_gradients`' inner products with directions, by two nudged forward passes of a copy for each direction.

    Not for bfloat16, whose rounding is larger than the nudge.

    Args:
        divisors: [modules], what the example's gradient is divided by.
        directions: [n, width]

    Returns:
        [targets, n]
    """
    home, devices = model.device, model.devices()
    directions, divisors = directions.to(home, model.model.dtype), divisors.to(home)
    parts = {
        name: (directions[:, made.place] / divisors[at]).to(devices[name])
        for at, (name, made) in enumerate(plan.sketches.items())
    }
    outputs = torch.zeros((), dtype=torch.float64, device=home)
    nudges = torch.zeros(len(directions), dtype=torch.float64, device=home)

    def measure(name: str, acts: torch.Tensor, output: torch.Tensor) -> None:
        outputs.add_(output.double().square().sum().to(home))
        nudges.add_(plan.sketches[name].nudge(acts, parts[name]).double().square().sum((1, 2)).to(home))

    with model.lock, torch.no_grad():
        modules = model.activate(checkpoint)
        with hooked(model, modules, measure):
            target_losses(model, [example])
        # A step for each direction: one for all would leave the small ones below the rounding.
        steps = NUDGE * (outputs / nudges.clamp_min(torch.finfo(torch.float64).tiny)).sqrt()
        steps[nudges == 0] = 0

        def nudged(sign: int) -> torch.Tensor:
            sizes = (sign * steps).to(directions.dtype)[:, None, None]

            def hook(name: str, acts: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
                return output + plan.sketches[name].nudge(acts, parts[name]) * sizes.to(output.device)

            with hooked(model, modules, hook):
                return torch.stack(target_losses(model, [example] * len(directions)), 1).double()

        scores = (nudged(1) - nudged(-1)) / (2 * steps)
        scores[:, nudges == 0] = 0  # nothing changes along no direction
        return scores


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
        self.vectors = torch.zeros(batch, plan.width, dtype=kind, device=model.device)
        self.divisors = torch.ones(batch, len(plan.sketches), dtype=kind, device=model.device)
        self.at = {name: at for at, name in enumerate(plan.sketches)}

    def hook(self, name: str, acts: torch.Tensor, output: torch.Tensor) -> None:
        """Called after a module's forward pass."""
        made, at = self.plan.sketches[name], self.at[name]
        kept = made.keep(acts.detach().to(self.vectors.dtype))

        def backward(grads: torch.Tensor) -> None:
            grads = grads.view(*acts.shape[:2], -1)  # [batch, seq, d_out], flattened or not
            part = made.project(kept, grads.to(self.vectors.dtype)).to(self.vectors.device)
            if self.given is not None:
                part = part / self.given[:, at, None]
            elif self.plan.layer:
                self.divisors[:, at] = part.norm(dim=1).clamp_min(torch.finfo(part.dtype).tiny)
                part = part / self.divisors[:, at, None]
            self.vectors[:, made.place] += part

        output.register_hook(backward)


Hook = Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor | None]


@contextmanager
def hooked(model: LoadedModel, modules: dict[str, nn.Module], call: Hook) -> Iterator[None]:
    """Call a hook with (name, input [batch, seq, d_in], output) after each module, and let gradients begin at those
    before which there is none: what lies below the first modules needs no backward pass. An output that the hook
    returns takes the place of the module's; some models flatten batch and sequence.
    """
    shape = (0, 0)

    def see(module: nn.Module, args: Any, output: torch.Tensor) -> None:
        nonlocal shape
        shape = (output.shape[0], output.shape[1])

    def forward(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor | None:
            if not whole_sequence(args[0], shape):
                return None
            acts = args[0].reshape(*shape, -1).to(output.device)  # accelerate moves an input behind the hook's back
            if torch.is_grad_enabled():  # a gradient is met at the output itself
                begins = not output.requires_grad
                if begins:
                    output = output.detach().requires_grad_(True).clone()  # no leaf: a model may change it in place
                call(name, acts, output)
                return output if begins else None
            changed = call(name, acts, output.view(*shape, -1))  # a nudge is added to the output as a sequence
            return None if changed is None else changed.view(output.shape)

        return hook

    handles = [module.register_forward_hook(forward(name)) for name, module in modules.items()]
    handles.append(model.model.get_input_embeddings().register_forward_hook(see))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def target_losses(model: LoadedModel, examples: Sequence[Example]) -> list[torch.Tensor]:
    """The loss of each target of each example."""
    logits, tokens = target_logits(model, examples)
    each = nn.functional.cross_entropy(logits, tokens, reduction="none")
    return list(each.split([len(example.positions) for example in examples]))


def target_logits(model: LoadedModel, examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    """What the model expects at each target, and what stands there; the examples' targets one after the other.

    The model runs up to the position before each example's last target, and the output embedding on the targets'
    positions alone. What is padded lies to the right, where a causal model does not look: it needs no mask.

    Returns:
        [targets, vocabulary], at least float32, and [targets].
    """
    lengths = [example.positions[-1] for example in examples]  # logits at i - 1 predict token i
    device = model.device
    ids = torch.zeros(len(examples), max(lengths), dtype=torch.long)
    for number, (example, length) in enumerate(zip(examples, lengths, strict=True)):
        ids[number, :length] = torch.tensor(example.ids[:length])
    places = [(number, position) for number, example in enumerate(examples) for position in example.positions]
    rows = torch.tensor([p[0] for p in places]).to(device)
    columns = torch.tensor([p[1] for p in places]).to(device)
    tokens = torch.tensor([examples[number].ids[position] for number, position in places]).to(device)

    def at_targets(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden = args[0]  # [batch, seq, d], on the last layer's device
        at = rows.to(hidden.device), columns.to(hidden.device) - 1
        return (hidden[at].unsqueeze(0),)

    handle = model.model.get_output_embeddings().register_forward_pre_hook(at_targets)
    try:
        output = model.model(input_ids=ids.to(device), use_cache=False)
    finally:
        handle.remove()
    logits = output.logits[0].to(device)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits, tokens
