"""Traces reach a collector over OTLP where one is configured, join the client's trace, and follow a job."""

import gzip
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from app import tracing
from tests.api.harness import jsonl, must, rows
from tests.operation.process import ROOT, Start

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}


class Collector(ThreadingHTTPServer):
    """An OTLP receiver: keeps the spans that it is sent, each with its service's name."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Receiver)
        self.spans: list[tuple[str, Any]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Receiver(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        body = self.rfile.read(int(self.headers["content-length"]))
        if self.headers.get("content-encoding") == "gzip":
            body = gzip.decompress(body)
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {one.key: one.value.string_value for one in resource.resource.attributes}
            spans = [span for scope in resource.scope_spans for span in scope.spans]
            self.server.spans += [(named["service.name"], span) for span in spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Be quiet."""


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_request_and_its_job_are_one_trace(start: Start, collector: Collector, tiny_model_dir: Path) -> None:
    service = start(otlp_endpoint=collector.url)
    service.api.register(tiny_model_dir)
    must(service.api.upload(jsonl(rows())), 201)
    asked = {"name": "idx", "model": "tiny", "dataset": "facts"}
    job_id = must(service.api.post("/indexes", json=asked, headers=PARENT), 202)["job"]["id"]
    service.api.wait(job_id)
    service.end()
    mine = [span for name, span in collector.spans if span.trace_id.hex() == TRACE and name == "headwater-api"]
    assert "POST /indexes" in [span.name for span in mine]
    linked = {link.trace_id.hex() for _, span in collector.spans for link in span.links}
    attributes = [{one.key: one.value.string_value for one in span.attributes} for _, span in collector.spans]
    jobs = [one for one in attributes if one.get("docket.key", "").startswith(job_id)]
    assert jobs, sorted(span.name for _, span in collector.spans)
    assert TRACE in linked | {span.trace_id.hex() for span in mine if span.name.startswith("run_job")}
    assert not any("/readyz" in span.name for _, span in collector.spans)


def test_a_collector_that_is_away_holds_nobody_up(start: Start) -> None:
    service = start(otlp_endpoint="http://127.0.0.1:9")
    must(service.api.get("/indexes"))
    service.end()


def test_no_endpoint_no_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in tracing.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert tracing.provider("", "headwater-api") is None


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "find_spec", lambda _: None)
    with pytest.raises(tracing.TracingError, match=r"headwater\[otel\]"):
        tracing.provider("http://127.0.0.1:4318", "headwater-api")


def test_the_service_runs_without_the_extra() -> None:
    code = "import sys; sys.modules['opentelemetry.sdk'] = None; import app.main; app.main.create_app()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
