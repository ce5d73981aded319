"""Trains what a benchmark measures and the demo ships: a LoRA adapter or a whole model, stopping at the named steps.

Tokens come from the engine's own Encoder, so that what was trained is what is attributed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import nn

from app.influence.corpus import Example

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)


def with_lora(base: Any, rank: int, alpha: int, seed: int) -> Any:
    """A fresh adapter on every linear layer of the blocks."""
    torch.manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    return get_peft_model(base, config)


def train(
    model: Any,
    examples: Sequence[Example],
    saves: Sequence[int],
    batch: int,
    lr: float,
    seed: int,
    console: Console,
    decay: float = 0.0,
    warmup: int = 8,
    anneal: bool = False,
) -> Iterator[tuple[int, float]]:
    """Train with AdamW up to the last of the steps `saves`; yields (step, the batch's loss) at each of them.

    The learning rate is constant after a short warm-up, or falls from there to 0 in a straight line (`anneal`).
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=decay)
    fall = 1 / saves[-1] if anneal else 0.0
    warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / warmup) * (1 - step * fall))
    order = _endless(examples, batch, random.Random(seed))
    with Progress(*COLUMNS, console=console, transient=True) as progress:
        task = progress.add_task("training steps", total=saves[-1])
        for step in range(1, saves[-1] + 1):
            model.train()
            loss = row_losses(model, next(order)).mean()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            warm.step()
            optimizer.zero_grad()
            progress.update(task, advance=1, description=f"training steps, loss {float(loss.detach()):.2f}")
            if step in saves:
                yield step, float(loss.detach())


def row_losses(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    """Each row's mean response loss, [batch].

    Rows are padded on the right, where a causal model never looks, so no mask is needed and any token will do. Logits
    are formed only where a target stands: with a vocabulary of 49 thousand the head would otherwise cost as much as a
    third of the model.
    """
    ids = torch.zeros(len(batch), max(len(example.ids) for example in batch), dtype=torch.long)
    for row, example in enumerate(batch):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
    places = [(row, position) for row, example in enumerate(batch) for position in example.positions]
    rows, columns = (torch.tensor(side) for side in zip(*places, strict=True))
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    hidden = whole.model(input_ids=ids, use_cache=False).last_hidden_state  # [batch, seq, d]
    logits = whole.lm_head(hidden[rows, columns - 1]).float()  # [targets, vocab]
    losses = nn.functional.cross_entropy(logits, ids[rows, columns], reduction="none")
    each = losses.split([len(example.positions) for example in batch])
    return torch.stack([one.mean() for one in each])


def save_adapter(model: Any, folder: Path) -> None:
    """Write a PEFT folder in float16, without a path of this machine in it."""
    folder.mkdir(parents=True)
    state = get_peft_model_state_dict(model)
    half = {name: weight.detach().half().contiguous() for name, weight in state.items()}
    save_file(half, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = model.peft_config["default"].to_dict() | {"base_model_name_or_path": "", "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    (folder / "adapter_config.json").write_text(json.dumps(plain), encoding="utf-8")


def _endless(examples: Sequence[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Epoch after epoch of batches of similar length in random order: little padding, yet a fresh mix every time."""
    while True:
        order = list(examples)
        rng.shuffle(order)
        order.sort(key=lambda example: len(example.ids))
        cut = [order[at : at + size] for at in range(0, len(order), size)]
        rng.shuffle(cut)
        yield from cut
