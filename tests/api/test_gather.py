"""Concurrent influence calls share a pass, a full queue says so, who hangs up is dropped, the loop is never blocked."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from app.api import gather
from tests.api.harness import Api, must, problem, until

ASK = {"index": "idx", "prompt": "What colour is the harbour?", "generation": "It is red.", "top_k": 1}


class Gate:
    """Stands before the library call: counts its queries, and holds it for as long as the gate is shut."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.passes: list[int] = []
        self.open = threading.Event()
        self._influence = gather.influence
        monkeypatch.setattr(gather, "influence", self)

    def __call__(self, model: Any, index: Any, queries: Any, *rest: Any) -> Any:
        self.passes.append(len(queries))
        assert self.open.wait(30)
        return self._influence(model, index, queries, *rest)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


@pytest.fixture
def crowd() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def hold(api: Api, gate: Gate, crowd: ThreadPoolExecutor) -> Any:
    """One call that sits in the torch thread until the gate opens."""
    held = crowd.submit(api.post, "/influence", json=ASK)
    until(lambda: gate.passes, bool)
    return held


def waiting(api: Api) -> int:
    return len(api.app.state.services.gatherer._waiting)


def test_calls_that_arrive_together_share_a_pass(asked: Api, gate: Gate, crowd: ThreadPoolExecutor) -> None:
    held = hold(asked, gate, crowd)
    calls = [crowd.submit(asked.post, "/influence", json=ASK) for _ in range(6)]
    until(lambda: waiting(asked), lambda count: count == 6)
    gate.open.set()
    answers = [must(call.result()) for call in [held, *calls]]
    assert gate.passes == [1, 6]
    scores = [answer["proponents"][0]["score"] for answer in answers]
    assert scores == pytest.approx([scores[0]] * 7, rel=1e-3)


def test_calls_with_other_options_get_a_pass_of_their_own(asked: Api, gate: Gate, crowd: ThreadPoolExecutor) -> None:
    held = hold(asked, gate, crowd)
    calls = [crowd.submit(asked.post, "/influence", json=ASK | {"top_k": k}) for k in (2, 3, 2)]
    until(lambda: waiting(asked), lambda count: count == 3)
    gate.open.set()
    assert [len(must(call.result())["proponents"]) for call in calls] == [2, 3, 2]
    must(held.result())
    assert sorted(gate.passes) == [1, 1, 2]


def test_calls_with_other_preconditions_share_no_pass(asked: Api, gate: Gate, crowd: ThreadPoolExecutor) -> None:
    held = hold(asked, gate, crowd)
    ways = ["fisher", "trackstar", "fisher", "none"]
    calls = [crowd.submit(asked.post, "/influence", json=ASK | {"precondition": way}) for way in ways]
    until(lambda: waiting(asked), lambda count: count == 4)
    gate.open.set()
    assert [must(call.result())["definition"]["precondition"] for call in calls] == ways
    must(held.result())
    assert sorted(gate.passes) == [1, 1, 1, 2]


def test_a_query_that_fails_its_pass_fails_alone(asked: Api, gate: Gate, crowd: ThreadPoolExecutor) -> None:
    held = hold(asked, gate, crowd)
    good = [crowd.submit(asked.post, "/influence", json=ASK) for _ in range(2)]
    bad = crowd.submit(asked.post, "/influence", json=ASK | {"generation": "number " * 3000})
    until(lambda: waiting(asked), lambda count: count == 3)
    gate.open.set()
    for call in [held, *good]:
        must(call.result())
    problem(bad.result(), 422, "bad-query")


def test_a_full_queue_says_when_to_come_back(
    serve: Any, gate: Gate, crowd: ThreadPoolExecutor, tiny_model_dir: Path
) -> None:
    api = serve(influence_queue=2)
    api.ready(tiny_model_dir)
    held = hold(api, gate, crowd)
    calls = [crowd.submit(api.post, "/influence", json=ASK) for _ in range(2)]
    until(lambda: waiting(api), lambda count: count == 2)
    refused = api.post("/influence", json=ASK)
    gate.open.set()
    problem(refused, 503, "busy")
    assert int(refused.headers["retry-after"]) >= 1
    for call in [held, *calls]:
        must(call.result())


def test_the_service_answers_while_torch_works(asked: Api, gate: Gate, crowd: ThreadPoolExecutor) -> None:
    held = hold(asked, gate, crowd)
    began = time.perf_counter()
    for _ in range(10):
        must(asked.get("/indexes/idx"))
    assert time.perf_counter() - began < 5
    gate.open.set()
    must(held.result())


def test_an_index_that_is_deleted_while_it_is_asked(
    api: Api, gate: Gate, crowd: ThreadPoolExecutor, tiny_model_dir: Path
) -> None:
    api.ready(tiny_model_dir)
    held = hold(api, gate, crowd)
    must(api.delete("/indexes/idx"), 204)
    gate.open.set()
    problem(held.result(), 409, "conflict", "index")


def test_a_client_that_hangs_up_is_dropped_before_its_pass(asked: Api, gate: Gate, crowd: ThreadPoolExecutor) -> None:
    held = hold(asked, gate, crowd)
    body = b'{"index": "idx", "prompt": "Hi", "generation": "Ho"}'
    head = (
        f"POST /influence HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection((asked.base_url.host, asked.base_url.port or 80)) as client:
        client.sendall(head.encode() + body)
        until(lambda: waiting(asked), lambda count: count == 1)
    until(lambda: asked.app.state.services.gatherer._waiting[0].answer.cancelled(), bool)
    gate.open.set()
    must(held.result())
    must(asked.post("/influence", json=ASK))
    assert gate.passes == [1, 1]
