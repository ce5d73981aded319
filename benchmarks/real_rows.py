"""Valuation on real rows: SmolLM2-135M on short rows of dolly and TOFU (benchmarks/valuation.py --model smollm2)."""

from __future__ import annotations

import hashlib
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plots import line_chart
from pools import GROUPS, Pool, dolly, relevant
from ranking import average_precision
from rich.table import Table
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from worth import (
    BUDGET,
    NORMALIZE,
    Lesson,
    console,
    cpu_seconds,
    free_rankings,
    one_pass,
    quarters,
    routes,
    say_routes,
    trained,
)

from app.influence.corpus import Example, Row
from app.influence.models import LoadedModel, ModelSpec, load
from app.valuation.bodies import LENGTHS, Body, carry, cut
from app.valuation.linfik import Direction, Products, mean_gradient
from app.valuation.pairs import fit_pairs, sketches
from app.valuation.ranks import spearman
from app.valuation.student import fit

OUT = Path(__file__).resolve().parent / "out"
LONGEST = 96
TEST = 150
LABELS = (25, 50, 100, 200, 400)
DRAWS = 5
LAYERS = (1, 3, 6)
LESSON = Lesson((0, 8, 16, 24), 8, 2e-5)
TESTED = 48
"""Rows whose loss the curves show."""


def run_smollm2(base: Path, data: Path, encoders: Sequence[Path]) -> dict[str, Any]:
    pool, model = dolly(data), load(ModelSpec(base))
    encoder = model.encoder("auto", LONGEST)
    rows, held = ([encoder.encode(row) for row in some] for some in (pool.rows, pool.validation))
    direction = mean_gradient(model, held, BUDGET)
    values, took = kept_pass(model, direction, pool, rows)
    scores = free_rankings(pool, values)
    good = torch.tensor(relevant(pool.groups))
    record: dict[str, Any] = {
        "rows": len(rows),
        "tokens": sum(len(one.ids) for one in rows),
        "auprc": {name: average_precision(found, good) for name, found in scores.items()},
        "means": {
            group: {name: float(values.values(name)[[g == group for g in pool.groups], 0].mean()) for name in NORMALIZE}
            for group in GROUPS
        },
        "cpu_seconds_of_products_with_norms": took,
        "routes": routes(model, direction, rows[:24], BUDGET),
    }
    table = Table(title=f"dolly: auPRC of useful rows ({float(good.double().mean()):.2f} of the pool)")
    for column in ("ranking", "auPRC"):
        table.add_column(column)
    for name, found in record["auprc"].items():
        table.add_row(name, f"{found:.3f}")
    console.print(table)
    say_routes("SmolLM2", record["routes"])
    record["students"] = students(model, pool, values, encoders, record)
    record["pairs"] = bi_encoder(model, pool, rows, held)
    console.print(f"bi-encoder on validation rows that it was not fitted to, by labels: {record['pairs']}")
    record["curves"] = curves(base, values, rows, [encoder.encode(row) for row in pool.test[:TESTED]])
    return record


def curves(base: Path, values: Products, rows: Sequence[Example], test: Sequence[Example]) -> dict[str, list[float]]:
    """The loss of other rows of the task while the model is trained on a part of the pool; one seed."""
    found = {}
    table = Table(
        title=f"SmolLM2: loss of {len(test)} test rows after training on a part of {len(rows)} rows, one seed"
    )
    for column in ("trained on", *(f"step {step}" for step in LESSON.steps)):
        table.add_column(column, justify="left" if column == "trained on" else "right")
    for name, places in quarters(values, ("unit",), 0).items():
        found[name] = trained(base, LESSON, [rows[at] for at in places], test, 0)
        table.add_row(name, *(f"{loss:.3f}" for loss in found[name]))
        console.print(f"{name}: {found[name]}")
    console.print(table)
    shown = {name: list(zip(map(float, LESSON.steps), line, strict=True)) for name, line in found.items()}
    line_chart(OUT / "valuation-curves-smollm2.svg", "Loss of test rows", "training steps", "nats", shown)
    return found


def bi_encoder(
    model: LoadedModel, pool: Pool, rows: Sequence[Example], held: Sequence[Example]
) -> dict[str, dict[str, float]]:
    """Spearman of held-out rows' values for a new validation set: all of LinFiK `unit`, and what lengths do not say.

    The form is fitted to pairs with one half of the validation rows; the other half is the new set.
    """
    ours, theirs = (sketches(model, some, "unit", BUDGET).astype(np.float64) for some in (held, rows))
    pairs = theirs @ ours.T  # [rows, validation rows]
    half = len(held) // 2
    with tempfile.TemporaryDirectory() as name:
        cut(model, LAYERS[1], Path(name))
        body = Body(Path(name))
        features, validation = (
            body.features(list[Row](some)).double().numpy() for some in (pool.rows, pool.validation)
        )
    found: dict[str, dict[str, float]] = {}
    for many in LABELS:
        every, beyond = [], []
        for draw in range(DRAWS):
            order = np.random.default_rng(draw).permutation(len(features))
            test, labelled = order[:TEST], order[TEST:][:many]
            form = fit_pairs(features[labelled], validation[:half], pairs[labelled][:, :half], draw)
            guess = form.candidates(features[test]) @ form.validation(validation[half:]).mean(0)
            truth = pairs[test][:, half:].mean(1)
            every.append(spearman(guess, truth))
            beyond.append(beyond_length(guess, truth, features[test, -LENGTHS:]))
        found[str(many)] = {"all": statistics.mean(every), "beyond length": statistics.mean(beyond)}
    return found


def beyond_length(guess: Any, truth: Any, lengths: Any) -> float:
    """Spearman correlation of what lengths do not say: of the ranks' residuals after a fit to the lengths' ranks."""
    ranks = [np.argsort(np.argsort(each)).astype(np.float64) for each in (guess, truth, *np.asarray(lengths).T)]
    known = np.stack([*ranks[2:], np.ones(len(ranks[0]))], 1)
    first, second = (each - known @ np.linalg.lstsq(known, each, rcond=None)[0] for each in ranks[:2])
    return float(np.corrcoef(first, second)[0, 1])


def kept_pass(model: LoadedModel, direction: Direction, pool: Pool, rows: Sequence[Example]) -> tuple[Products, float]:
    """Products with norms of the pool and their CPU seconds; finished blocks come from benchmarks/out."""
    key = hashlib.sha256(
        json.dumps([model.fingerprint, [row.id for row in (*pool.rows, *pool.validation)], LONGEST, BUDGET]).encode()
    ).hexdigest()[:12]
    folder = OUT / f"valuation-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    parts, took = [], 0.0
    for start in range(0, len(rows), 64):
        file = folder / f"{start:06d}.safetensors"
        if not file.exists():
            seconds: dict[str, float] = {}
            with cpu_seconds(seconds, "s"):
                found = one_pass(model, [direction], rows[start : start + 64], norms=True)
            kept = {"dots": found.dots, "norms": found.norms}
            save_file(kept, file, {"seconds": str(seconds["s"])})
        parts.append(load_file(file))
        with safe_open(file, "pt") as opened:
            took += float(opened.metadata()["seconds"])
        console.print(f"values: {min(start + 64, len(rows))} of {len(rows)} rows, {took:.0f} CPU seconds")
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Products(whole["dots"], whole["norms"], direction.norms[:, None]), took


def students(
    model: LoadedModel, pool: Pool, values: Products, encoders: Sequence[Path], record: dict[str, Any]
) -> dict[str, Any]:
    """Held-out Spearman correlation of each student against its number of labels, and its CPU seconds."""
    found: dict[str, Any] = {}
    cost = record["routes"]["cpu_seconds"]
    a_row = {
        "none": cost["directional"] / record["routes"]["rows"],
        "layer": record["cpu_seconds_of_products_with_norms"] / len(pool.rows),
        "unit": record["cpu_seconds_of_products_with_norms"] / len(pool.rows),
    }
    with tempfile.TemporaryDirectory() as name:
        makers: dict[str, Callable[[Path], None]] = {
            f"own layers, {n}": lambda folder, n=n: cut(model, n, folder)
            for n in LAYERS  # type: ignore[misc]
        }
        makers |= {path.name: lambda folder, path=path: carry(path, folder) for path in encoders}  # type: ignore[misc]
        for title, make in makers.items():
            folder = Path(name) / title.replace(" ", "-")
            make(folder)
            took: dict[str, float] = {}
            with cpu_seconds(took, "s"):
                features = Body(folder).features(list[Row](pool.rows)).double().numpy()
            student = took["s"] / len(pool.rows)
            found[title] = {
                "cpu_seconds_a_row": student,
                "spearman": {n: label_curve(features, values.values(n).numpy(), spearman) for n in NORMALIZE},
                "beyond_length": {n: label_curve(features, values.values(n).numpy(), None) for n in NORMALIZE},
                "share_of_linfik_with_10_%": {n: 0.1 + student / a_row[n] for n in NORMALIZE},
            }
        found["lengths alone"] = {
            "cpu_seconds_a_row": 0.0,
            "spearman": {n: label_curve(features[:, -LENGTHS:], values.values(n).numpy(), spearman) for n in NORMALIZE},
            "share_of_linfik_with_10_%": dict.fromkeys(NORMALIZE, 0.1),
        }
    table = Table(title=f"students: Spearman on {TEST} held-out rows, mean of {DRAWS} draws, by number of labels")
    for column in ("student", "normalize", *map(str, LABELS), "10 % labels + student, of LinFiK's time"):
        table.add_column(column, justify="right")
    for title, told in found.items():
        for n, each in told.get("beyond_length", {}).items():
            table.add_row(f"{title}: beyond length", n, *(f"{each[str(many)]:.2f}" for many in LABELS), "")
        for n in NORMALIZE:
            curve = [f"{told['spearman'][n][str(many)]:.2f}" for many in LABELS]
            table.add_row(title, n, *curve, f"{told['share_of_linfik_with_10_%'][n]:.1%}")
    console.print(table)
    lines = {
        f"{title}, {n}": [(float(many), told["spearman"][n][str(many)]) for many in LABELS]
        for title, told in found.items()
        for n in ("none", "unit")
    }
    file = OUT / "valuation-labels.svg"
    line_chart(file, "Students on held-out rows", "labels", "Spearman", dict(list(lines.items())[-9:]))
    return found


def label_curve(features: Any, values: Any, measure: Callable[[Any, Any], float] | None) -> dict[str, float]:
    """By number of labels; the held-out rows are the same for all of them, and others in each draw.

    Args:
        measure: of a guess and the truth; None: what lengths do not say (`beyond_length`).
    """
    found: dict[str, list[float]] = {str(many): [] for many in LABELS}
    for draw in range(DRAWS):
        order = np.random.default_rng(draw).permutation(len(features))
        test, rest = order[:TEST], order[TEST:]
        for many in LABELS:
            head = fit(features[rest[:many]], values[rest[:many]], 0, draw)
            guess, truth = head.predict(features[test])[0][:, 0], values[test, 0]
            lengths = features[test, -LENGTHS:]
            found[str(many)].append(measure(guess, truth) if measure else beyond_length(guess, truth, lengths))
    return {many: statistics.mean(each) for many, each in found.items()}
