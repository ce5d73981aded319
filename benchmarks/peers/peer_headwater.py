"""Headwater on a job, by the rules of the others: `build` in this process, or `http` against a service of its own.

The rows' texts (`rows.jsonl`) and the queries' (`queries.jsonl`) are in the job's folder; it is checked that the tokens
which Headwater makes of them are those of the job.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import httpx2
from exchange import Job, the_job

from app.influence.building import build
from app.influence.corpus import Message, Row, row_from_json
from app.influence.index import IndexSpec, open_index
from app.influence.models import ModelSpec, load
from app.influence.projection import ProjectionSpec
from app.influence.retrieval import Options, Query, influence
from app.processes import await_ready, end, free_port, start

TOP = 10


def main() -> None:
    """Run the job's method."""
    job = the_job()
    folder = job.folder / "headwater"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    rows = [row_from_json(line) for line in (job.folder / "rows.jsonl").read_text(encoding="utf-8").splitlines()]
    told = [json.loads(line) for line in (job.folder / "queries.jsonl").read_text(encoding="utf-8").splitlines()]
    queries = [Query(tuple(Message(**m) for m in one["messages"]), one["generation"]) for one in told]
    if job.method == "http":
        over_http(job, folder, queries)
        return
    model = load(ModelSpec(Path(job.model)))
    spec = IndexSpec(ProjectionSpec(), token_budget=job.budget, **job.options)
    encoder = model.encoder(spec.template, spec.max_length)
    assert [list(encoder.encode(row).ids) for row in rows] == [row.ids for row in job.rows], "the tokens differ"
    steps = build(folder / "index", model, rows, spec)
    with job.collecting():  # planning and writing included; what comes after the gradients is timed by itself
        for step in steps:
            if step.stage == "gradients" and step.rows == step.total_rows and step.tokens == step.total_tokens:
                break
    began = time.perf_counter()
    list(steps)
    job.figures["after_collection_seconds"] = time.perf_counter() - began
    index = open_index(folder / "index")
    by_id: dict[str, Row] = {row.id: row for row in rows}
    for query in queries[: job.latency]:
        with job.query():
            influence(model, index, [query], Options(top_k=TOP, tokens="none"), by_id.__getitem__)
    size = sum(file.stat().st_size for file in (folder / "index" / "shards").glob("*.[fs]*"))
    job.finish(bytes_per_row=size / len(rows))


def over_http(job: Job, folder: Path, queries: list[Query]) -> None:
    """The same questions to `headwater serve`, one after the other."""
    port, log = free_port(), folder / "service.log"
    settings = {
        "HEADWATER_DATA_DIR": str(folder / "data"),
        "HEADWATER_ALLOWED_ROOTS": json.dumps([str(Path(job.model).parent)]),
        "HEADWATER_PORT": str(port),
        "HEADWATER_LOG_LEVEL": "WARNING",
    }
    process = start(["serve"], log, settings)
    try:
        url = f"http://127.0.0.1:{port}"
        await_ready(process, url, log)
        with httpx2.Client(base_url=url, timeout=600) as client:
            content = (job.folder / "rows.jsonl").read_bytes()
            requests: list[tuple[str, dict[str, Any]]] = [
                ("/models", {"json": {"name": "model", "path": job.model}}),
                ("/datasets", {"data": {"name": "rows"}, "files": {"file": ("rows.jsonl", content)}}),
                ("/indexes", {"json": {"name": "index", "model": "model", "dataset": "rows"}}),
            ]
            for path, request in requests:
                client.post(path, **request).raise_for_status()
            while (state := client.get("/indexes/index").json()["state"]) != "ready":
                assert state != "failed", "the index could not be built"
                time.sleep(0.5)
            for number, query in enumerate([queries[0], *queries[: job.latency]]):
                asked = {
                    "index": "index",
                    "messages": [vars(one) for one in query.messages],
                    "generation": query.generation,
                    "top_k": TOP,
                    "tokens": "none",
                }
                if number == 0:  # loads the model
                    client.post("/influence", json=asked).raise_for_status()
                    continue
                with job.query():
                    client.post("/influence", json=asked).raise_for_status()
        job.finish()
    finally:
        end(process)


if __name__ == "__main__":
    main()
