"""A POST that makes something is done once, however often it is sent."""

import threading
from pathlib import Path
from typing import Any

import pytest

from app.api import datasets
from tests.api.harness import Api, jsonl, must, problem, rows

KEY = {"Idempotency-Key": "once"}


def send(api: Api, content: bytes, name: str = "facts") -> Any:
    return api.post("/datasets", data={"name": name}, files={"file": ("facts.jsonl", content)}, headers=KEY)


def test_the_same_request_gets_the_same_answer(api: Api) -> None:
    first, again = send(api, jsonl(rows(3))), send(api, jsonl(rows(3)))
    assert must(first, 201) == must(again, 201)
    assert again.headers["idempotency-replayed"] == "true"
    assert again.headers["location"] == first.headers["location"]
    assert len(must(api.get("/datasets"))["items"]) == 1


def test_a_build_is_submitted_once(api: Api, tiny_model_dir: Path) -> None:
    api.register(tiny_model_dir)
    must(api.upload(jsonl(rows())), 201)
    body = {"name": "idx", "model": "tiny", "dataset": "facts"}
    first, again = (must(api.post("/indexes", json=body, headers=KEY), 202) for _ in range(2))
    assert first == again
    assert len(must(api.get("/jobs"))["items"]) == 1
    api.wait(first["job"]["id"])


def test_another_body_under_the_same_key_is_refused(api: Api) -> None:
    must(send(api, jsonl(rows(3))), 201)
    problem(send(api, jsonl(rows(4))), 422, "idempotency-key-reused", "Idempotency-Key")
    problem(send(api, jsonl(rows(3)), name="other"), 422, "idempotency-key-reused", "Idempotency-Key")


def test_a_failed_request_may_be_tried_again_under_its_key(api: Api) -> None:
    problem(send(api, b"{"), 422, "bad-row")
    must(send(api, jsonl(rows(3))), 201)


def test_a_request_in_flight_is_refused(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go = threading.Event(), threading.Event()
    read = datasets.read_file

    def slow(*args: Any) -> Any:
        started.set()
        assert go.wait(30)
        return read(*args)

    monkeypatch.setattr(datasets, "read_file", slow)
    answers: list[Any] = []
    first = threading.Thread(target=lambda: answers.append(send(api, jsonl(rows(3)))))
    first.start()
    assert started.wait(30)
    refused = send(api, jsonl(rows(3)))
    go.set()
    first.join()
    problem(refused, 409, "request-in-flight", "Idempotency-Key")
    assert refused.headers["retry-after"] == "1"
    must(answers[0], 201)
