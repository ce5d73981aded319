"""SIGTERM under load: every request gets a whole answer, the running job is handed back, event streams end."""

import signal
import threading
import time
from collections import Counter
from pathlib import Path

import httpx2

from tests.api.harness import jsonl, must, rows, until
from tests.operation.process import Service, Start

ASK = {"index": "idx", "prompt": "What colour is the harbour?", "generation": "It is red.", "top_k": 2}
CLIENTS = 8


def keep_asking(service: Service, outcomes: "Counter[str]", stop: threading.Event) -> None:
    """Ask until the service is gone. A connection that is refused was never taken; one that breaks was dropped."""
    with httpx2.Client(base_url=service.api.base_url, timeout=60) as client:
        while not stop.is_set():
            try:
                response = client.post("/influence", json=ASK)
            except httpx2.ConnectError:
                outcomes["refused"] += 1
                return
            except httpx2.TransportError as error:
                outcomes[type(error).__name__] += 1
                return
            whole = response.status_code == 200 and bool(response.json()["proponents"])
            told = response.status_code == 503 and "retry-after" in response.headers
            outcomes["answered" if whole else "told to wait" if told else response.text] += 1


def test_sigterm_under_load_breaks_no_request_and_hands_the_job_back(start: Start, tiny_model_dir: Path) -> None:
    service = start(progress_interval_s=0.05)
    service.api.ready(tiny_model_dir)
    must(service.api.upload(jsonl(rows(900, start=12)), name="more"), 201)
    job_id = must(service.api.post("/indexes/idx/samples", json={"dataset": "more"}), 202)["job"]["id"]
    outcomes: Counter[str] = Counter()
    stop = threading.Event()
    crowd = [threading.Thread(target=keep_asking, args=(service, outcomes, stop)) for _ in range(CLIENTS)]
    for client in crowd:
        client.start()
    until(lambda: outcomes["answered"], lambda many: many >= CLIENTS)
    until(lambda: service.api.job(job_id), lambda job: job["progress"] and job["progress"]["done"] >= 100)
    began = time.monotonic()
    service.process.send_signal(signal.SIGTERM)
    service.process.wait(60)
    took = time.monotonic() - began
    stop.set()
    for client in crowd:
        client.join()
    # uvicorn may close an idle connection in the moment in which the client reuses it: that request was never taken
    broken = outcomes.total() - outcomes["answered"] - outcomes["told to wait"] - outcomes["refused"]
    assert broken - outcomes["RemoteProtocolError"] - outcomes["ReadError"] - outcomes["WriteError"] == 0, outcomes
    taken = [line for line in service.log() if line["event"] == "request" and line["path"] == "/influence"]
    assert {line["status"] for line in taken} <= {200, 503}
    assert sum(line["status"] == 200 for line in taken) == outcomes["answered"]
    assert took < 15
    assert "task put back" in [line["event"] for line in service.log() if line.get("job_id") == job_id]

    again = start()
    done = again.api.wait(job_id)
    assert (done["state"], done["result"]["rows"]) == ("succeeded", 912)


def test_a_stream_of_events_does_not_hold_the_end_up(
    start: Start, queue_without_workers: str, tiny_model_dir: Path
) -> None:
    service = start(embedded_worker="false", queue_url=queue_without_workers)
    service.api.register(tiny_model_dir)
    must(service.api.upload(jsonl(rows())), 201)
    job_id = service.api.build()["job"]["id"]
    with httpx2.Client(base_url=service.api.base_url, timeout=60) as client:
        with client.stream("GET", f"/jobs/{job_id}/events") as events:
            lines = events.iter_lines()
            assert next(lines).startswith(("event", "data", "id", "retry"))
            began = time.monotonic()
            service.process.send_signal(signal.SIGTERM)
            for _ in lines:
                pass
        service.process.wait(60)
    assert time.monotonic() - began < 15


def test_calls_that_cannot_be_answered_in_time_are_told_so(start: Start, tiny_model_dir: Path) -> None:
    service = start(shutdown_grace_s=0.05, max_batch=1)
    service.api.ready(tiny_model_dir)
    outcomes: Counter[str] = Counter()
    stop = threading.Event()
    crowd = [threading.Thread(target=keep_asking, args=(service, outcomes, stop)) for _ in range(32)]
    for client in crowd:
        client.start()
    until(lambda: outcomes["answered"], lambda many: many >= 1)
    service.process.send_signal(signal.SIGTERM)
    service.process.wait(60)
    for client in crowd:
        client.join()
    assert outcomes["told to wait"] >= 1, outcomes
    statuses = {line["status"] for line in service.log() if line["event"] == "request"}
    assert statuses <= {200, 201, 202, 503}
