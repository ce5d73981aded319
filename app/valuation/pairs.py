"""The bi-encoder: <e(z), e(v)> ~ LinFiK(z, v), which values rows for a new validation set without a label.

Both sides have the student's features; e is linear on them, so the model is bilinear, x_z^T W x_v, and the ridge
solution for W is closed: in the singular bases of both sides every entry is shrunk by its own factor. W's own
decomposition gives e(z) and e(v). Its labels are all pairs of labelled and validation rows, from projected gradients:
one backward pass a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from app.influence.building import batches
from app.influence.corpus import Example
from app.influence.errors import ModelError
from app.influence.gradients import gradients, plan_for
from app.influence.index import write_file
from app.influence.models import LoadedModel
from app.influence.projection import ProjectionSpec
from app.valuation.linfik import Normalize
from app.valuation.ranks import spearman
from app.valuation.student import PENALTIES, Floats, Head, standard

SKETCH = ProjectionSpec("kronecker", 32)
RANK = 64
"""Numbers of e(z) and e(v)."""
FILE = "pairs.safetensors"


def sketches(model: LoadedModel, examples: Sequence[Example], normalize: Normalize, budget: int) -> NDArray[np.float32]:
    """[rows, numbers]: projected gradients whose inner products are LinFiK's values of pairs, up to the projection."""
    plan = plan_for(model, SKETCH, "layer" if normalize == "layer" else "none")
    found = torch.zeros(len(examples), plan.width)
    for batch in batches(examples, budget):
        part = gradients(model, model.checkpoints[-1], plan, [examples[i] for i in batch]).vectors.float().cpu()
        if normalize == "unit":
            part = part / part.norm(dim=1, keepdim=True).clamp_min(torch.finfo(part.dtype).tiny)
        if normalize == "layer":
            part = part / len(plan.sketches) ** 0.5  # the mean over modules
        found[batch] = part
    vectors: NDArray[np.float32] = found.numpy()
    return vectors


@dataclass(frozen=True)
class Pairs:
    """A bilinear form between the standardised features of candidates and of validation rows.

    Attributes:
        mean, scale: [width], of the candidates' features; the validation rows' are measured by the same.
        left, right: [width + 1, rank]; the last feature of each side is 1, so that neither side needs a bias.
    """

    mean: Floats
    scale: Floats
    left: Floats
    right: Floats
    penalty: float

    def candidates(self, features: Floats) -> Floats:
        """e(z), [rows, rank]"""
        return self._sides(features) @ self.left

    def validation(self, features: Floats) -> Floats:
        """e(v), [rows, rank]"""
        return self._sides(features) @ self.right

    def head(self, validation: Floats) -> Head:
        """The head that values rows for validation groups.

        Args:
            validation: [groups, rank], the mean e(v) of each group.
        """
        weights = self.left @ validation.T  # [width + 1, groups]
        return Head(self.mean, self.scale, weights[None, :-1], weights[None, -1], self.penalty, 0.0)

    def again(self, candidates: Floats, validation: Floats, values: Floats) -> Pairs:
        """A form with the same penalty, fitted to other labels."""
        return _fit(candidates, validation, values, self.mean, self.scale, self.penalty)

    def _sides(self, features: Floats) -> Floats:
        x = (features - self.mean) / self.scale
        return np.concatenate([x, np.ones((len(x), 1))], 1)

    def save(self, folder: Path) -> None:
        """Beside the student's head."""
        arrays = {"mean": self.mean, "scale": self.scale, "left": self.left, "right": self.right}
        packed = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        write_file(folder / FILE, save({**packed, "penalty": np.array([self.penalty])}))


def load_pairs(folder: Path) -> Pairs:
    """The bilinear form of a student's folder.

    Raises:
        ModelError: the student is not a bi-encoder.
    """
    try:
        arrays = load_file(folder / FILE)
        penalty = float(arrays.pop("penalty")[0])
        return Pairs(penalty=penalty, **arrays)
    except (OSError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"the student in '{folder.name}' is not a bi-encoder", field="student") from error


def fit_pairs(candidates: Floats, validation: Floats, values: Floats, seed: int) -> Pairs:
    """Fit the form; the penalty is chosen on a fifth of the candidates that is left out, by the Spearman correlation of
    their mean values, and the form is then fitted to all.

    Args:
        candidates: [rows, width] features.
        validation: [validation rows, width] features.
        values: [rows, validation rows]
    """
    mean, scale = standard(candidates)
    order = np.random.default_rng(seed).permutation(len(candidates))
    out, kept = order[: len(order) // 5], order[len(order) // 5 :]
    truth = values[out].mean(1)
    scored = []
    for penalty in PENALTIES:
        made = _fit(candidates[kept], validation, values[kept], mean, scale, penalty)
        guess = made.candidates(candidates[out]) @ made.validation(validation).mean(0)
        scored.append((spearman(guess, truth), penalty))
    return _fit(candidates, validation, values, mean, scale, max(scored)[1])


def _fit(candidates: Floats, validation: Floats, values: Floats, mean: Floats, scale: Floats, penalty: float) -> Pairs:
    empty = Pairs(mean, scale, np.zeros((0, 0)), np.zeros((0, 0)), penalty)
    u, s, at = np.linalg.svd(empty._sides(candidates), full_matrices=False)
    p, t, bt = np.linalg.svd(empty._sides(validation), full_matrices=False)
    both = s[:, None] * t[None]  # [i, j]
    shrunk = both / (both**2 + penalty * float((both**2).mean()) + 1e-12)
    core = shrunk * (u.T @ values @ p)
    first, size, second = np.linalg.svd(core, full_matrices=False)
    rank = min(RANK, len(size))
    root = np.sqrt(size[:rank])
    return Pairs(mean, scale, at.T @ (first[:, :rank] * root), bt.T @ (second[:rank].T * root), penalty)
