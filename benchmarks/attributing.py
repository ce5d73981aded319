"""Every row's score for every query, by the engine's own index and by rankings that cost nothing."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from ranking import bm25, chance, cosine

import app.influence
from app.influence.building import build
from app.influence.corpus import Example, Row
from app.influence.ekfac import fit
from app.influence.index import IndexSpec, open_index
from app.influence.models import LoadedModel
from app.influence.projection import ProjectionSpec
from app.influence.retrieval import Options, Query, influence

KEPT = Path(__file__).resolve().parent / "out" / "scores"
Scores = NDArray[np.float32]
"""[queries, rows]"""


@dataclass(frozen=True)
class Way:
    """One way to score: what an index holds, and how it is asked."""

    name: str
    spec: IndexSpec
    options: Options


def way(name: str, normalisation: Any = "layer", projection: ProjectionSpec | None = None, **asked: Any) -> Way:
    """A way, by what differs from the usual."""
    return Way(
        name, IndexSpec(projection or ProjectionSpec(), normalisation, max_length=64), Options(tokens="none", **asked)
    )


@dataclass(frozen=True)
class Scored:
    """What a way gave, and the seconds that its index (shared by all ways of one) and its queries took."""

    way: Way
    scores: Scores
    manifest: dict[str, Any]
    build_seconds: float
    query_seconds: float


def attribute(
    model: LoadedModel,
    rows: Sequence[Row],
    queries: Sequence[Query],
    ways: Sequence[Way],
    heldout: Sequence[Row] = (),
) -> Iterator[Scored]:
    """Build an index for each spec among the ways, and ask it for every row.

    What comes of it is kept in `KEPT` by all that it follows from, the engine's code among that: a benchmark that was
    stopped goes on, and one that is run again with other rankings beside it computes nothing twice.
    """
    asked = [model.fingerprint, [row.id for row in (*rows, *heldout)], [repr(query) for query in queries], _code()]
    files = {one: KEPT / f"{_hash(json.dumps([asked, repr(one)]).encode())}.npz" for one in ways}
    for spec in dict.fromkeys(one.spec for one in ways):
        mine = [one for one in ways if one.spec == spec]
        missing = [one for one in mine if not files[one].is_file()]
        for scored in _attribute(model, rows, queries, missing, heldout) if missing else ():
            _keep(files[scored.way], scored)
        yield from (_read(files[one], one) for one in mine)


def _attribute(
    model: LoadedModel, rows: Sequence[Row], queries: Sequence[Query], ways: Sequence[Way], heldout: Sequence[Row]
) -> Iterator[Scored]:
    """All ways of one spec."""
    place = {row.id: at for at, row in enumerate(rows)}
    by_id = {row.id: row for row in rows}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index"
        began = time.perf_counter()
        list(build(path, model, rows, ways[0].spec, heldout))
        if any(one.options.rerank == "ekfac" for one in ways):
            list(fit(path, model, rows))
        built = time.perf_counter() - began
        index = open_index(path)
        for one in ways:
            everything = replace(one.options, top_k=len(rows), candidates=len(rows), direction="both")
            began = time.perf_counter()
            answers = influence(model, index, queries, everything, by_id.__getitem__)
            took = time.perf_counter() - began
            scores = np.zeros((len(queries), len(rows)), dtype=np.float32)
            for number, answer in enumerate(answers):
                for hit in (*answer.proponents, *answer.opponents):
                    scores[number, place[hit.id]] = hit.score
            yield Scored(one, scores, index.manifest.to_dict(), built, took)


def _keep(file: Path, scored: Scored) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    told = {"manifest": scored.manifest, "build": scored.build_seconds, "query": scored.query_seconds}
    new = file.with_suffix(".new.npz")
    np.savez(new, scores=scored.scores, told=np.array(json.dumps(told)))
    new.replace(file)


def _read(file: Path, one: Way) -> Scored:
    kept = np.load(file)
    told = json.loads(str(kept["told"]))
    return Scored(one, kept["scores"], told["manifest"], told["build"], told["query"])


@cache
def _code() -> str:
    """A hash of the engine."""
    folder = Path(app.influence.__file__).parent
    return _hash(b"".join(file.read_bytes() for file in sorted(folder.glob("*.py"))))


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def baselines(
    model: LoadedModel, rows: Sequence[Row], queries: Sequence[Query], asked: Sequence[Example]
) -> dict[str, Scores]:
    """Rankings without gradients: chance, words, the model's own states."""
    encoder = model.encoder()
    documents = [f"{row.prompt}\n{row.response}" for row in rows]
    texts = [f"{query.messages[0].content}\n{query.generation}" for query in queries]
    states = embed(model, [encoder.encode(row) for row in rows])
    return {
        "random": chance(len(queries), len(rows)).numpy(),
        "BM25": bm25(texts, documents).numpy(),
        "embedding": cosine(embed(model, asked), states).numpy(),
    }


@torch.no_grad()
def embed(model: LoadedModel, examples: Sequence[Example]) -> torch.Tensor:
    """Mean-pooled last hidden states of prompt and answer at the last checkpoint, [examples, d]."""
    found = []
    with model.lock:
        model.activate(model.checkpoints[-1])
        for example in examples:
            out = model.model(input_ids=torch.tensor([example.ids]), output_hidden_states=True, use_cache=False)
            found.append(out.hidden_states[-1][0].mean(0))
    return torch.stack(found)
