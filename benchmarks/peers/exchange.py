"""What a driver is given and what it hands back, in a folder, so that each peer can live in an environment of its own.

A job is `job.json` (model folder, method, token budget), `rows.npz` and `queries.npz` (token ids of all sequences one
after the other, their lengths, and which of them are targets). A driver writes `scores.npy` [queries, rows], where
higher means that the row pushed the model towards the query, and `result.json`. Only numpy and the standard library
are needed here.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

IGNORED = -100
"""The label of a token that is no target."""


@dataclass(frozen=True)
class Sample:
    """A sequence: token ids, and the label of each, which is the token itself or IGNORED."""

    ids: list[int]
    labels: list[int]

    @property
    def targets(self) -> int:
        """How many tokens count."""
        return sum(label != IGNORED for label in self.labels)


def write_samples(file: Path, ids: Sequence[Sequence[int]], targets: Sequence[Sequence[bool]]) -> None:
    """Write sequences and which of their tokens are targets."""
    np.savez(
        file,
        ids=np.concatenate([np.asarray(one, dtype=np.int32) for one in ids]),
        targets=np.concatenate([np.asarray(one, dtype=bool) for one in targets]),
        lengths=np.asarray([len(one) for one in ids], dtype=np.int64),
    )


def read_samples(file: Path) -> list[Sample]:
    """What `write_samples` wrote."""
    kept = np.load(file)
    ends = kept["lengths"].cumsum()[:-1]
    labels = np.where(kept["targets"], kept["ids"], IGNORED)
    both = zip(np.split(kept["ids"], ends), np.split(labels, ends), strict=True)
    return [Sample(ids.tolist(), wanted.tolist()) for ids, wanted in both]


@dataclass
class Job:
    """What is asked of a driver, and what it has measured so far."""

    folder: Path
    model: str
    method: str
    budget: int
    """Padded tokens a batch."""
    latency: int
    """How many queries to time one by one (0: none)."""
    options: dict[str, Any]
    rows: list[Sample]
    queries: list[Sample]
    seconds: float = 0.0
    """Spent in the loop that collects the rows."""
    tokens: int = 0
    """That the loop saw."""
    figures: dict[str, Any] = field(default_factory=dict)

    @contextmanager
    def collecting(self, tokens: int | None = None) -> Iterator[None]:
        """Time a pass over the rows (all of them, if not told otherwise), and the memory that it needs at most."""
        forget_peak()
        began = time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
        self.tokens += sum(len(row.ids) for row in self.rows) if tokens is None else tokens
        self.figures["peak_mib"] = max(peak_mib(), self.figures.get("peak_mib", 0.0))

    @contextmanager
    def query(self) -> Iterator[None]:
        """Time one query."""
        began = time.perf_counter()
        yield
        self.figures.setdefault("query_seconds", []).append(time.perf_counter() - began)

    def finish(self, scores: Any = None, bytes_per_row: float | None = None) -> None:
        """Write what came out."""
        if scores is not None:
            found = np.asarray(scores, dtype=np.float32)
            assert found.shape == (len(self.queries), len(self.rows)), found.shape
            np.save(self.folder / "scores.npy", found)
        if self.seconds:
            self.figures["tokens_per_second"] = self.tokens / self.seconds
        if bytes_per_row is not None:
            self.figures["bytes_per_row"] = bytes_per_row
        (self.folder / "result.json").write_text(json.dumps(self.figures) + "\n", encoding="utf-8")


def the_job() -> Job:
    """The job in the folder that is named on the command line."""
    folder = Path(sys.argv[1])
    told = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    return Job(folder, **told, rows=read_samples(folder / "rows.npz"), queries=read_samples(folder / "queries.npz"))


def forget_peak() -> None:
    """Let the kernel begin anew to count the largest memory of this process."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib() -> float:
    """The largest memory since then."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def padded(samples: Sequence[Sample]) -> dict[str, Any]:
    """int64 arrays [samples, seq], by the names that transformers has for them."""
    length = max(len(sample.ids) for sample in samples)
    rest = [length - len(sample.ids) for sample in samples]
    return {
        "input_ids": np.array([s.ids + [0] * more for s, more in zip(samples, rest, strict=True)]),
        "labels": np.array([s.labels + [IGNORED] * more for s, more in zip(samples, rest, strict=True)]),
        "attention_mask": np.array([[1] * len(s.ids) + [0] * more for s, more in zip(samples, rest, strict=True)]),
    }


def batches(samples: Sequence[Sample], budget: int) -> list[list[int]]:
    """Places of sequences of similar length, so many together that they stay within the budget of padded tokens."""
    found: list[list[int]] = []
    for at in sorted(range(len(samples)), key=lambda at: -len(samples[at].ids)):
        if found and (len(found[-1]) + 1) * len(samples[found[-1][0]].ids) <= budget:
            found[-1].append(at)
        else:
            found.append([at])
    return found
