"""The student: a linear head on a frozen body, fitted to LinFiK's values, that scores a row in one short pass.

Ridge regression of the z-scored values on standardised features, in closed form from one singular value decomposition.
The penalty is chosen by the Spearman correlation of the leave-one-out predictions, which the same decomposition gives.
An ensemble of heads, each fitted to rows drawn with replacement, says by its spread how sure the student is.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from app.influence.corpus import Row
from app.influence.errors import ModelError
from app.influence.index import write_file
from app.valuation.bodies import LENGTHS, Body
from app.valuation.ranks import spearman

Floats = NDArray[np.float64]
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 1e1)
"""Of the mean squared singular value times the number of features over the number of rows."""
FREE = 10.0
"""How much larger the lengths are made than the other features, so that the penalty hardly holds them: values depend on
them strongly, and among a thousand equals they would be shrunk away."""
HEAD, ABOUT = "head.safetensors", "student.json"


@dataclass(frozen=True)
class Head:
    """What turns features into values.

    Attributes:
        mean, scale: [width], of the features.
        weights: [1 + ensemble, width, groups]; the first is fitted to all rows, the others to draws from them.
        bias: [1 + ensemble, groups].
        penalty: the chosen one of PENALTIES.
        left_out: Spearman correlation of the leave-one-out predictions of the first group.
    """

    mean: Floats
    scale: Floats
    weights: Floats
    bias: Floats
    penalty: float
    left_out: float

    def predict(self, features: Floats) -> tuple[Floats, Floats]:
        """([rows, groups] values, [rows, groups] standard deviations over the ensemble)."""
        x = (features - self.mean) / self.scale
        values = x @ self.weights[0] + self.bias[0]
        each = np.einsum("rw,ewg->erg", x, self.weights[1:]) + self.bias[1:, None]
        return values, each.std(0) if len(each) else np.zeros_like(values)


def fit(features: Floats, values: Floats, ensemble: int, seed: int) -> Head:
    """Fit a head.

    Args:
        features: [rows, width]
        values: [rows, groups], all finite.
        ensemble: heads besides the first.
    """
    mean, scale = standard(features)
    x = (features - mean) / scale
    centre, spread = values.mean(0), values.std(0)
    y = (values - centre) / np.where(spread > 0, spread, 1)
    solved = Ridge(x, y)
    scored = [(spearman(solved.left_out(penalty)[:, 0], y[:, 0]), penalty) for penalty in PENALTIES]
    left_out, penalty = max(scored)
    fitted = [solved.solve(penalty)]
    rng = np.random.default_rng(seed)
    for _ in range(ensemble):
        drawn = rng.integers(len(x), size=len(x))
        fitted.append(Ridge(x[drawn], y[drawn]).solve(penalty))
    weights = np.stack([weight for weight, _ in fitted]) * spread
    bias = np.stack([own for _, own in fitted]) * spread + centre
    return Head(mean, scale, weights, bias, penalty, left_out)


def standard(features: Floats) -> tuple[Floats, Floats]:
    """(mean, scale), [width] each; a column that never changes keeps the scale 1, the lengths are enlarged."""
    scale = features.std(0)
    scale = np.where(scale > 1e-9, scale, 1.0)
    scale[-LENGTHS:] /= FREE
    return features.mean(0), scale


class Ridge:
    """min |x w + b - y|^2 + penalty |w|^2 for any penalty, from one decomposition; y is [rows, targets]."""

    def __init__(self, x: Floats, y: Floats) -> None:
        self.x_mean, self.y_mean = x.mean(0), y.mean(0)
        self.y = y - self.y_mean
        self.u, self.s, self.vt = np.linalg.svd(x - self.x_mean, full_matrices=False)
        self.unit = float((self.s**2).mean()) * x.shape[1] / len(x)

    def solve(self, penalty: float) -> tuple[Floats, Floats]:
        """(weights [width, targets], bias [targets])"""
        shrunk = self.s / (self.s**2 + penalty * self.unit + 1e-12)
        weights = self.vt.T @ (shrunk[:, None] * (self.u.T @ self.y))
        return weights, self.y_mean - self.x_mean @ weights

    def left_out(self, penalty: float) -> Floats:
        """[rows, targets]: each row's prediction by a fit without it."""
        kept = self.s**2 / (self.s**2 + penalty * self.unit + 1e-12)
        hat = (self.u * kept) @ (self.u.T @ self.y)
        own = ((self.u**2) @ kept + 1 / len(self.u))[:, None]  # the mean is fitted too
        predicted: Floats = self.y_mean + self.y - (self.y - hat) / np.maximum(1 - own, 1e-9)
        return predicted


@dataclass
class Student:
    """A body, its head, and the names of the groups that it values rows for (the first is the whole validation set)."""

    body: Body
    head: Head
    groups: tuple[str, ...]

    def score(self, rows: Sequence[Row]) -> tuple[Floats, Floats]:
        """([rows, groups] values, [rows, groups] uncertainty), in one pass of the body."""
        return self.head.predict(self.body.features(rows).double().numpy())


def save_head(folder: Path, head: Head, groups: Sequence[str], about: dict[str, object]) -> None:
    """Write a head beside its body, so that the folder is a whole student."""
    arrays = {"mean": head.mean, "scale": head.scale, "weights": head.weights, "bias": head.bias}
    write_file(folder / HEAD, save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))
    told = {"groups": list(groups), "penalty": head.penalty, "left_out": head.left_out, **about}
    write_file(folder / ABOUT, json.dumps(told, indent=1, sort_keys=True).encode())


def load_student(folder: Path, device: str = "cpu") -> Student:
    """A student out of its folder, on the side of whoever owns the rows: neither model nor validation rows are needed.

    Raises:
        ModelError: the folder holds no student.
    """
    try:
        told = json.loads((folder / ABOUT).read_bytes())
        arrays = load_file(folder / HEAD)
        head = Head(penalty=told["penalty"], left_out=told["left_out"], **arrays)
        groups = tuple(told["groups"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ModelError(f"there is no student in '{folder.name}'", field="student") from error
    body = Body(folder / "body", device)
    if head.mean.shape != (body.width,):
        raise ModelError("the student's head does not fit its body", field="student")
    return Student(body, head, groups)
