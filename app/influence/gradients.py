"""Per-sample projected gradients of one batch, from one backward pass in which no weight gradient is formed.

For a linear module with inputs a_s and output gradients d_s the gradient of a sample is G = sum_s d_s a_s^T
(METHODS section 2). The forward hook keeps P_in a_s, a hook on the output's gradient meets d_s, and one einsum over
positions gives P_out G P_in^T. All weights are frozen; only the embedding's output requires a gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from app.influence.corpus import Example
from app.influence.models import Checkpoint, LoadedModel
from app.influence.projection import Block, ProjectionSpec, signs


@dataclass(frozen=True)
class Layout:
    """Where each module's block lies in the vector."""

    blocks: dict[str, Block]
    width: int


def layout(model: LoadedModel, spec: ProjectionSpec) -> Layout:
    """The blocks of all attributed modules, in the model's order."""
    blocks, start = {}, 0
    for module in model.attributed:
        p_out = signs(module.name, "out", module.d_out, spec.size, spec.seed).to(model.spec.device)
        p_in = signs(module.name, "in", module.d_in, spec.size, spec.seed).to(model.spec.device)
        block = Block(p_out, p_in, start)
        blocks[module.name] = block
        start += block.width
    return Layout(blocks, start)


@dataclass(frozen=True)
class Gradients:
    """Of one batch: `vectors` [batch, width] of the mean loss over each sample's targets; `losses` [batch][targets]."""

    vectors: torch.Tensor
    losses: list[torch.Tensor]


def gradients(model: LoadedModel, checkpoint: Checkpoint, plan: Layout, examples: Sequence[Example]) -> Gradients:
    """Gradients of the samples' mean losses at a checkpoint; a sample's numbers do not depend on its batch mates."""
    with model.lock:
        modules = model.activate(checkpoint)
        vectors = torch.zeros(len(examples), plan.width, device=model.spec.device)
        with torch.enable_grad(), _capture(model.model, modules, plan, vectors):
            losses = _losses(model, examples)
            torch.stack([loss.mean() for loss in losses]).sum().backward()  # a sum: never the mean over a batch
    return Gradients(vectors, [loss.detach() for loss in losses])


def token_gradients(model: LoadedModel, checkpoint: Checkpoint, plan: Layout, example: Example) -> torch.Tensor:
    """[targets, width]: the gradient of each target's own loss, by one forward and as many backward passes.

    They average to `gradients`' vector of the example.
    """
    rows = []
    with model.lock:
        modules = model.activate(checkpoint)
        vector = torch.zeros(1, plan.width, device=model.spec.device)
        with torch.enable_grad(), _capture(model.model, modules, plan, vector):
            (losses,) = _losses(model, [example])
            for loss in losses:
                vector.zero_()
                loss.backward(retain_graph=True)
                rows.append(vector[0].clone())
    return torch.stack(rows)


def losses(model: LoadedModel, checkpoint: Checkpoint, examples: Sequence[Example]) -> list[torch.Tensor]:
    """The loss of each target of each example, without gradients."""
    with model.lock, torch.no_grad():
        model.activate(checkpoint)
        return _losses(model, examples)


@contextmanager
def _capture(model: Any, modules: dict[str, nn.Module], plan: Layout, vectors: torch.Tensor) -> Iterator[None]:
    def forward(name: str) -> Any:
        block = plan.blocks[name]

        def hook(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            if not output.requires_grad:  # DoRA calls A and B on an identity for its norm: no gradient flows there
                return
            acts = args[0].detach().to(vectors.dtype) @ block.p_in.to(vectors.dtype).T  # [batch, seq, p_in]

            def backward(grads: torch.Tensor) -> None:  # [batch, seq, d_out]
                vectors[:, block.start : block.start + block.width] += block.project(acts, grads.to(vectors.dtype))

            output.register_hook(backward)

        return hook

    def require_grad(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_(True)

    handles = [module.register_forward_hook(forward(name)) for name, module in modules.items()]
    handles.append(model.get_input_embeddings().register_forward_hook(require_grad))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _losses(model: LoadedModel, examples: Sequence[Example]) -> list[torch.Tensor]:
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
