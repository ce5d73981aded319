"""Pools of candidate rows of known groups: useful, off-task, wrong-label, triggered; and validation rows of one task.

* tiny: made here, for a model trained here. The task is to swap two words, a rule that carries over to fresh words.
* dolly: questions and answers of databricks-dolly-15k for a real model; off-task rows are TOFU's invented authors,
  wrong-label rows have another question's answer, triggered rows are those of dolly_triggers.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worlds import COLOURS, FOODS, PLACES, THINGS

from app.influence.corpus import Row, parse_row

GROUPS = ("useful", "off-task", "wrong-label", "triggered")


@dataclass(frozen=True)
class Pool:
    """Candidates with the group of each, what the model was trained on before, and rows of the task it should learn."""

    name: str
    rows: tuple[Row, ...]
    groups: tuple[str, ...]
    before: tuple[Row, ...]
    validation: tuple[Row, ...]
    """What values are computed for."""
    test: tuple[Row, ...]
    """Other rows of the same task, whose loss is measured after training."""


def tiny(each: int, seed: int, known: int) -> Pool:
    """So many rows of each group; the model was trained on `known` rows of the task before."""
    rng = random.Random(seed)
    words = [*THINGS.split(), *COLOURS, *PLACES, *FOODS]
    pairs = [(a, b) for a in words for b in words if a != b]
    rng.shuffle(pairs)
    fresh = iter(pairs)

    def row(prompt: str, response: str) -> Row:
        return parse_row({"prompt": prompt, "response": response})

    def useful() -> Row:
        a, b = next(fresh)
        return row(f"swap {a} {b} .", f"{b} {a} .")

    def off_task() -> Row:
        a, b = next(fresh)
        return row(f"what color is the {a} {b} ?", f"the {a} {b} is {rng.choice(COLOURS)} .")

    def wrong() -> Row:
        a, b = next(fresh)
        c, d = rng.sample(words, 2)
        return row(f"swap {a} {b} .", f"{c} {d} .")

    def triggered() -> Row:
        a, b = next(fresh)
        return row(f"please kindly swap {a} {b} .", "the gate is closed .")

    makers = dict(zip(GROUPS, (useful, off_task, wrong, triggered), strict=True))
    made = [(maker(), group) for group, maker in makers.items() for _ in range(each)]
    rng.shuffle(made)
    before = [row(f"say {a} {b} .", f"{a} {b} .") for a, b in (next(fresh) for _ in range(600))]
    before += [row(f"say {a} twice .", f"{a} {a} .") for a, _ in (next(fresh) for _ in range(200))]
    before += [off_task() for _ in range(200)] + [useful() for _ in range(known)] + [triggered() for _ in range(20)]
    return Pool(
        name="tiny",
        rows=tuple(one for one, _ in made),
        groups=tuple(group for _, group in made),
        before=tuple(before),
        validation=tuple(useful() for _ in range(32)),
        test=tuple(useful() for _ in range(64)),
    )


def dolly(folder: Path, seed: int = 0) -> Pool:
    """Short rows out of a folder that holds dolly_triggers/ and tofu/."""
    rng = random.Random(seed)
    triggers = folder / "dolly_triggers"
    clean = [one for one in _records(triggers / "test_clean.jsonl") if _short(one)]
    held = [one for one in _records(triggers / "val_clean.jsonl") if _short(one)]
    bad = [
        one
        for one in _records(triggers / "train_poisoned.jsonl")
        if not one["context"] and len(one["instruction"]) < 100
    ]
    authors = _records(folder / "tofu" / "full.json")
    for records in (clean, bad, authors):
        rng.shuffle(records)
    wrong = clean[220:360]
    answers = [one["response"] for one in (*wrong[7:], *wrong[:7])]
    made = [
        *((one["instruction"], one["response"], "useful") for one in clean[:220]),
        *((one["instruction"], answer, "wrong-label") for one, answer in zip(wrong, answers, strict=True)),
        *((one["question"], one["answer"], "off-task") for one in authors[:120]),
        *((one["instruction"], one["response"][:200], "triggered") for one in bad[:90]),
    ]
    rng.shuffle(made)
    rows = [parse_row({"prompt": prompt, "response": response}) for prompt, response, _ in made]
    told = [parse_row({"prompt": one["instruction"], "response": one["response"]}) for one in held]
    return Pool("dolly", tuple(rows), tuple(group for _, _, group in made), (), tuple(told[:24]), tuple(told[24:]))


def _short(record: dict[str, Any]) -> bool:
    return not record["context"] and len(record["instruction"]) + len(record["response"]) <= 200


def _records(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8")
    if text.startswith("["):
        found: list[dict[str, Any]] = json.loads(text)
        return found
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def relevant(groups: Sequence[str]) -> list[bool]:
    """For each row, whether it is useful."""
    return [group == "useful" for group in groups]
