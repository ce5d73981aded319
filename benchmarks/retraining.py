"""What the model would have said without some of its rows: a bank of models that were retrained on random halves.

A tiny Llama is pretrained once; every retraining begins there, takes the same batches in the same order, and leaves out
of them the rows that its half lacks. Kept are the masks and each query's loss, [subsets, seeds, queries], in a folder
whose name follows from all that they depend on: a bank that was stopped goes on, and is paid for once.

The linear datamodelling score (LDS) of a ranking: over the halves, the rank correlation of the summed scores of a
half's rows with the negated loss of the query; its mean over queries.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from facts import Facts, facts
from measuring import spearman
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import nn
from training import row_losses
from worlds import messages, small_llama, word_tokenizer

from app.influence.corpus import Encoder, Example
from app.influence.models import Checkpoint, ModelSpec


@dataclass(frozen=True)
class Recipe:
    """The world, the model and how it is trained, with AdamW and a constant rate after a short warm-up."""

    people: int = 40
    others: int = 40
    pretrained: int = 60
    asked: int = 48
    width: int = 128
    layers: int = 4
    alike: float = 0.97
    """Cosine of the embeddings of a name and its byname, at the beginning."""
    pretraining_steps: int = 150
    lr: float = 1e-3
    batch: int = 16
    epochs: int = 7
    seed: int = 0


class Laboratory:
    """A recipe's world and models, kept in a folder."""

    def __init__(self, out: Path, recipe: Recipe) -> None:
        self.recipe = recipe
        r = recipe
        self.world: Facts = facts(r.people, r.others, r.pretrained, r.asked, r.seed)
        told = [asdict(recipe), self.world.texts, [q.gold for q in self.world.queries]]
        self.folder = out / f"bank-{hashlib.sha256(json.dumps(told).encode()).hexdigest()[:8]}"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n", encoding="utf-8")
        self.tokenizer = word_tokenizer(self.world.texts, self.folder / "base")
        encoder = Encoder(self.tokenizer, max_length=64)
        self.rows = [encoder.encode(row) for row in self.world.rows]
        self.queries = [encoder.encode_query(messages(q.prompt), q.response)[0] for q in self.world.queries]
        self.pretraining = [encoder.encode(row) for row in self.world.pretraining]

    @cached_property
    def base(self) -> dict[str, torch.Tensor]:
        """The pretrained weights; trained where they are not there yet."""
        file = self.folder / "base.safetensors"
        if not file.is_file():
            model = self._model()
            with torch.no_grad():
                table = model.get_input_embeddings().weight  # [vocabulary, d]
                name, byname = (
                    self.tokenizer.convert_tokens_to_ids(list(side)) for side in zip(*self.world.pairs, strict=True)
                )
                near = self.recipe.alike
                table[byname] = near * table[name] + (1 - near**2) ** 0.5 * table[byname]
            for _ in self._steps(model, self.pretraining, None, 0, 32, self.recipe.pretraining_steps, decay=0.1):
                pass
            save_file({name: weight.contiguous() for name, weight in model.state_dict().items()}, file)
        return load_file(file)

    def losses(self, seed: int, kept: Collection[int]) -> torch.Tensor:
        """Of the queries, [queries], by a model that was retrained on those rows."""
        model = self._model(self.base)
        for _ in self._steps(model, self.rows, frozenset(kept), seed, self.recipe.batch, self._last):
            pass
        with torch.no_grad():
            return row_losses(model, self.queries)

    def checkpoints(self, epochs: Sequence[float]) -> list[ModelSpec]:
        """The model that is attributed: trained on every row in the order of the first seed, after so many epochs."""
        each = self._last / self.recipe.epochs
        steps = {max(1, round(epoch * each)): self.folder / f"epoch-{epoch:g}" for epoch in epochs}
        if not all((path / "model.safetensors").is_file() for path in steps.values()):
            model = self._model(self.base)
            for step in self._steps(model, self.rows, None, 0, self.recipe.batch, max(steps)):
                if step in steps:
                    self.tokenizer.save_pretrained(steps[step])
                    model.save_pretrained(steps[step])
        return [ModelSpec(path, checkpoints=(Checkpoint(path.name),)) for path in steps.values()]

    @property
    def _last(self) -> int:
        return self.recipe.epochs * -(-len(self.rows) // self.recipe.batch)

    def _model(self, weights: dict[str, torch.Tensor] | None = None) -> Any:
        model = small_llama(self.tokenizer, self.recipe.width, self.recipe.layers, self.recipe.seed, spread=0.05)
        if weights is not None:
            model.load_state_dict(weights)
        return model

    def _steps(
        self,
        model: Any,
        examples: Sequence[Example],
        kept: Collection[int] | None,
        seed: int,
        batch: int,
        last: int,
        decay: float = 0.0,
    ) -> Iterator[int]:
        """Train; yields the number of each step. Batches are cut before rows are left out of them."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=self.recipe.lr, weight_decay=decay)
        warm = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
        rng, step = random.Random(seed), 0
        model.train()
        while step < last:
            order = rng.sample(range(len(examples)), len(examples))
            for at in range(0, len(order), batch):
                some = [examples[i] for i in order[at : at + batch] if kept is None or i in kept]
                if some:
                    torch.autograd.backward(row_losses(model, some).mean())
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                    optimizer.step()
                    optimizer.zero_grad()
                warm.step()
                step += 1
                yield step
                if step == last:
                    break


@dataclass(frozen=True)
class Bank:
    """What was measured."""

    masks: NDArray[np.bool_]  # [subsets, rows]
    losses: NDArray[np.float32]  # [subsets, seeds, queries]

    def lds(self, scores: NDArray[Any]) -> NDArray[np.float64]:
        """The LDS of each query, [queries], of scores [queries, rows]; higher scores mean lower losses."""
        predicted = self.masks.astype(np.float64) @ scores.astype(np.float64).T  # [subsets, queries]
        return spearman(predicted, -self.losses.mean(1))

    @property
    def agreement(self) -> NDArray[np.float64]:
        """[queries], how well one seed's losses foretell another's: what no ranking can be expected to pass by far."""
        return spearman(self.losses[:, 0], self.losses[:, 1])


def fill(
    laboratory: Laboratory, subsets: int, seeds: int, tell: Callable[[int, int], None] = lambda done, of: None
) -> Bank:
    """The bank of a laboratory; computes what it lacks and keeps it after every retraining."""
    count, queries = len(laboratory.rows), len(laboratory.queries)
    rng = np.random.default_rng(0)
    masks = np.zeros((subsets, count), dtype=bool)
    for mask in masks:
        mask[rng.permutation(count)[: count // 2]] = True
    np.save(laboratory.folder / "masks.npy", masks)
    file = laboratory.folder / "losses.npy"
    losses = np.full((subsets, seeds, queries), np.nan, dtype=np.float32)
    if file.is_file():
        there = np.load(file)
        common = tuple(slice(min(sides)) for sides in zip(there.shape, losses.shape, strict=True))
        losses[common] = there[common]
    missing = np.argwhere(np.isnan(losses).any(2))
    for done, (subset, seed) in enumerate(missing):
        tell(done, len(missing))
        kept = frozenset(np.flatnonzero(masks[subset]).tolist())
        losses[subset, seed] = laboratory.losses(int(seed), kept).numpy()
        np.save(file.with_suffix(".new.npy"), losses)
        file.with_suffix(".new.npy").replace(file)
    return Bank(masks, losses)
