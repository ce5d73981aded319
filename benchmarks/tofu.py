"""TOFU's own measures (Maini et al., 2024), as its `aggregate_eval_stat.py` computes them, and its rows.

* probability: exp(-loss) of the answer, loss being the mean over its tokens; for real authors and world facts that over
  the sum of it and of the wrong answers' probabilities.
* truth ratio of a question: the wrong answers' geometric mean probability over the right (paraphrased) answer's, which
  is exp(loss of the right one - mean loss of the wrong ones). What goes into utility is max(0, 1 - truth ratio).
* ROUGE-L recall of the greedy answer. TOFU stems words first; this does not.
* model utility: the harmonic mean of those nine (three measures on retained rows, real authors, world facts).
* forget quality: the p-value of a two-sided Kolmogorov-Smirnov test that the forget rows' truth ratios of the unlearned
  and of the retain-only model come from one distribution.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Question:
    """One row of a file with perturbed answers; `right` is the paraphrase where there is one."""

    question: str
    answer: str
    right: str
    wrong: tuple[str, ...]


def read(path: Path) -> list[Question]:
    """A perturbed file; one JSON object a line."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip():
            one = json.loads(line)
            right = one.get("paraphrased_answer", one["answer"])
            found.append(Question(one["question"], one["answer"], right, tuple(one["perturbed_answer"])))
    return found


def truth_ratio(right: float, wrong: Sequence[float]) -> float:
    """Of losses; above 1 where the wrong answers are the likelier ones."""
    return math.exp(right - sum(wrong) / len(wrong))


def share_of_options(right: float, wrong: Sequence[float]) -> float:
    """The right answer's probability among the options', from losses."""
    return math.exp(-right) / sum(math.exp(-loss) for loss in (right, *wrong))


def rouge_l_recall(reference: str, answer: str) -> float:
    """The longest common subsequence of words over the reference's words."""
    words, found = (re.findall(r"[a-z0-9]+", text.lower()) for text in (reference, answer))
    if not words:
        return 0.0
    best = [0] * (len(found) + 1)  # of the words so far against each prefix of the answer
    for word in words:
        before = best[:]
        for at, other in enumerate(found, start=1):
            best[at] = before[at - 1] + 1 if word == other else max(before[at], best[at - 1])
    return best[-1] / len(words)


def harmonic_mean(values: Sequence[float]) -> float:
    """0 if any is."""
    return 0.0 if min(values) <= 0 else len(values) / sum(1 / value for value in values)


def ks_pvalue(first: Sequence[float], second: Sequence[float]) -> float:
    """Exact and two-sided: the share of all ways to mix the samples whose distance is at least the one seen.

    A mix is a path on a grid from (0, 0) to (n, m); those that stay within the distance are counted, as shares, so that
    nothing overflows.
    """
    n, m = len(first), len(second)
    one, two = np.sort(np.asarray(first, float)), np.sort(np.asarray(second, float))
    places = np.concatenate([one, two])
    gaps = np.searchsorted(one, places, "right") * m - np.searchsorted(two, places, "right") * n
    seen = int(np.abs(gaps).max())  # the distance times n m, a whole number
    if seen == 0:
        return 1.0
    within = np.zeros(m + 1)  # probability to have come to (i, j) without having reached the distance
    for i in range(n + 1):
        for j in range(m + 1):
            if i == 0 and j == 0:
                within[0] = 1.0
                continue
            up = within[j] * (n - i + 1) / (n + m - i - j + 1) if i else 0.0
            right = within[j - 1] * (m - j + 1) / (n + m - i - j + 1) if j else 0.0
            within[j] = up + right if abs(i * m - j * n) < seen else 0.0
    return float(min(1.0, max(0.0, 1.0 - within[m])))
