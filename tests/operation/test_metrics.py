"""What can be watched: every metric is there, counts what it says, and answers when the catalog does not."""

import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.parser import text_string_to_metric_families

from app.jobs.metrics import exposed
from tests.api.conftest import Serve
from tests.api.harness import Api, jsonl, must, rows


def scrape(api: Api) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """Each sample by its name and labels."""
    response = api.get("/metrics")
    assert response.status_code == 200
    families = text_string_to_metric_families(response.text)
    return {(one.name, frozenset(one.labels.items())): one.value for family in families for one in family.samples}


def value(found: dict[Any, float], name: str, **labels: str) -> float:
    return found[name, frozenset(labels.items())]


def test_a_build_and_a_query_can_be_watched(asked: Api) -> None:
    must(asked.post("/influence", json={"index": "idx", "generation": "It is red.", "top_k": 2}))
    found = scrape(asked)
    assert value(found, "headwater_job_rows_total", kind="build_index", stage="gradients") > 0
    assert value(found, "headwater_jobs_ended_total", kind="build_index", state="succeeded") == 1
    assert value(found, "headwater_jobs", kind="build_index", state="succeeded") == 1
    assert value(found, "headwater_jobs_running", kind="build_index") == 0
    assert value(found, "headwater_index_rows", index="idx") == 12
    shards = sum(file.stat().st_size for file in asked.app.state.services.settings.indexes_dir.rglob("shards/*.[fs]*"))
    assert value(found, "headwater_index_bytes", index="idx") == shards
    assert value(found, "headwater_queue_depth") == 0
    assert value(found, "headwater_catalog_up") == 1
    for stage in ("gradients", "search", "tokens", "wait", "total"):
        assert value(found, "headwater_influence_stage_seconds_count", stage=stage) >= 1
    assert value(found, "process_resident_memory_bytes") > 0


def test_jobs_that_no_worker_takes_are_the_queue_s_depth(
    serve: Serve, queue_without_workers: str, tiny_model_dir: Path
) -> None:
    api = serve(embedded_worker=False, queue_url=queue_without_workers)
    api.register(tiny_model_dir)
    must(api.upload(jsonl(rows())), 201)
    api.build()
    found = scrape(api)
    assert value(found, "headwater_queue_depth") == 1
    assert 0 < value(found, "headwater_queue_oldest_seconds") < 60
    assert value(found, "headwater_jobs", kind="build_index", state="queued") == 1


def test_the_size_of_an_index_follows_its_rows_and_goes_with_it(api: Api, tiny_model_dir: Path) -> None:
    api.ready(tiny_model_dir)
    before = value(scrape(api), "headwater_index_bytes", index="idx")
    must(api.upload(jsonl(rows(4, start=40)), name="more"), 201)
    more = must(api.post("/indexes/idx/samples", json={"dataset": "more"}), 202)
    api.wait(more["job"]["id"])
    found = scrape(api)
    assert value(found, "headwater_index_rows", index="idx") == 16
    assert value(found, "headwater_index_bytes", index="idx") > before
    must(api.delete("/indexes/idx"), 204)
    assert ("headwater_index_rows", frozenset({("index", "idx")})) not in scrape(api)


def test_metrics_answer_without_the_catalog(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def away() -> Any:
        raise ConnectionError("the database is away")

    monkeypatch.setattr(api.app.state.services.database, "catalog", away)
    assert value(scrape(api), "headwater_catalog_up") == 0


def test_a_worker_serves_its_own_registry() -> None:
    registry = CollectorRegistry()
    Counter("headwater_job_rows", "Rows.", registry=registry).inc(7)
    with exposed(registry, "127.0.0.1", 0) as port:
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
    assert "headwater_job_rows_total 7.0" in text
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics")
