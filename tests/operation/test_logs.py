"""A line of the log says which request and which job it belongs to, through the queue and into the worker."""

from pathlib import Path

from tests.api.harness import jsonl, must, rows
from tests.operation.process import Start


def test_a_job_s_lines_carry_the_id_of_the_request_that_submitted_it(start: Start, tiny_model_dir: Path) -> None:
    service = start()
    service.api.register(tiny_model_dir)
    must(service.api.upload(jsonl(rows())), 201)
    asked = {"name": "idx", "model": "tiny", "dataset": "facts"}
    submitted = service.api.post("/indexes", json=asked, headers={"X-Request-ID": "from-the-client-7"})
    job_id = must(submitted, 202)["job"]["id"]
    service.api.wait(job_id)
    service.end()
    lines = [line for line in service.log() if line.get("job_id") == job_id]
    assert {"task started", "job ended"} <= {line["event"] for line in lines}
    assert {line["request_id"] for line in lines} == {"from-the-client-7"}
    requests = [line for line in service.log() if line["event"] == "request" and line["path"] == "/indexes"]
    assert [line["request_id"] for line in requests] == ["from-the-client-7"]
