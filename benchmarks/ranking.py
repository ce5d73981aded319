"""How well a ranking finds the rows that are known to be behind an answer, and the rankings that cost nothing.

auPRC is average precision: the mean of the precision at each relevant row found. At top k only the first k rows of the
ranking count, and what is found is divided by min(k, number of relevant rows), so 1 is always reachable:

    auPRC@k = sum over ranks i <= k of relevant(i) * precision@i / min(k, R)

auROC at top k is the area under the ROC curve of a ranking of which only the first k rows are ordered: all later rows
are tied at the end, where chance orders them (.5 if no row is ordered). With k = n both are the usual figures.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

import torch

CUTOFFS = (5, 10, 50, 100, 500, 1000)
"""RapidIn's."""


def average_precision(scores: torch.Tensor, relevant: torch.Tensor, k: int | None = None) -> float:
    """auPRC of one ranking.

    Args:
        scores: [rows]
        relevant: [rows] bool.
    """
    k = min(k or len(scores), len(scores))
    found = relevant[scores.argsort(descending=True, stable=True)][:k].double()
    precision = found.cumsum(0) / torch.arange(1, k + 1)
    return float((precision * found).sum()) / min(k, int(relevant.sum()))


def roc_area(scores: torch.Tensor, relevant: torch.Tensor, k: int | None = None) -> float:
    """auROC of one ranking: the share of (relevant, other) pairs in the right order, ties counting half."""
    k = min(k or len(scores), len(scores))
    ordered = relevant[scores.argsort(descending=True, stable=True)]
    height = torch.arange(len(scores), 0, -1)
    height[k:] = 0
    good, other = height[ordered], height[~ordered]
    above = (good[:, None] > other).double().mean()
    tied = (good[:, None] == other).double().mean()
    return float(above + tied / 2)


def means(scores: torch.Tensor, relevant: torch.Tensor) -> dict[str, dict[str, float]]:
    """auPRC and auROC, averaged over queries, overall ("all") and at those cut-offs that the rows allow."""
    cuts: dict[str, int | None] = {"all": None, **{str(k): k for k in CUTOFFS if k <= scores.shape[1]}}
    return {
        "auprc": {name: _mean([average_precision(one, relevant, k) for one in scores]) for name, k in cuts.items()},
        "auroc": {name: _mean([roc_area(one, relevant, k) for one in scores]) for name, k in cuts.items()},
    }


def bm25(queries: Sequence[str], documents: Sequence[str], k1: float = 1.5, b: float = 0.75) -> torch.Tensor:
    """Okapi BM25 over lower-cased words; [queries, documents]."""
    bags = [Counter(_words(text)) for text in documents]
    sizes = [sum(bag.values()) for bag in bags]
    mean = sum(sizes) / len(sizes)
    within = Counter(word for bag in bags for word in bag)
    scores = torch.zeros(len(queries), len(bags))
    for q, text in enumerate(queries):
        for word in _words(text):
            rarity = math.log(1 + (len(bags) - within[word] + 0.5) / (within[word] + 0.5))
            for d, bag in enumerate(bags):
                if count := bag[word]:
                    scores[q, d] += rarity * count * (k1 + 1) / (count + k1 * (1 - b + b * sizes[d] / mean))
    return scores


def cosine(queries: torch.Tensor, documents: torch.Tensor) -> torch.Tensor:
    """[queries, documents] of embeddings [n, width]."""
    unit = [each / each.norm(dim=1, keepdim=True) for each in (queries, documents)]
    found: torch.Tensor = unit[0] @ unit[1].T
    return found


def chance(queries: int, documents: int) -> torch.Tensor:
    """Random scores, the same every time."""
    return torch.rand(queries, documents, generator=torch.Generator().manual_seed(0))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+|[^\w\s]+", text.lower())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
