"""Every error is a problem, every request has an id, and an unexpected error says nothing about the inside."""

from typing import Any

import pytest

from app.catalog.models import Models
from tests.api.harness import Api, must, problem


def test_an_unknown_address(asked: Api) -> None:
    problem(asked.get("/nowhere"), 404, "not-found")


def test_a_method_that_is_not_allowed(asked: Api) -> None:
    refused = asked.put("/models")
    problem(refused, 405, "method-not-allowed")
    assert refused.headers["allow"]


def test_a_body_that_is_not_json(asked: Api) -> None:
    refused = asked.post("/influence", content=b"{", headers={"Content-Type": "application/json"})
    problem(refused, 422, "invalid-request")


def test_an_unexpected_error_leaks_nothing(asked: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_args: Any) -> None:
        raise RuntimeError("the password is swordfish")

    monkeypatch.setattr(Models, "page", broken)
    refused = asked.get("/models")
    problem(refused, 500, "internal")
    assert "swordfish" not in refused.text


def test_the_request_id_comes_back(asked: Api) -> None:
    assert asked.get("/healthz", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    assert asked.get("/healthz").headers["x-request-id"]
    assert len(asked.get("/healthz", headers={"X-Request-ID": "x" * 500}).headers["x-request-id"]) < 100


def test_a_job_remembers_the_request_that_submitted_it(asked: Api) -> None:
    assert must(asked.get("/jobs"))["items"][0]["request_id"]


def test_a_bad_cursor(asked: Api) -> None:
    problem(asked.get("/datasets/facts/samples", params={"cursor": "x"}), 422, "bad-cursor", "cursor")


def test_health_and_metrics(asked: Api) -> None:
    assert must(asked.get("/healthz")) == must(asked.get("/readyz")) == {"status": "ok"}
    text = asked.get("/metrics").text
    assert 'headwater_jobs{kind="build_index",state="succeeded"} 1.0' in text
    assert 'route="/models"' in text


def test_the_docs_are_served(asked: Api) -> None:
    assert "swagger" in asked.get("/docs").text.lower()
