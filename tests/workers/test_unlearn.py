"""An unlearning that is killed with SIGKILL ends in the same adapter as one that is not."""

import json
import signal
from pathlib import Path

from tests.api.harness import jsonl, must, rows, until
from tests.operation.process import Start

REQUEST = {
    "model": "tiny",
    "dataset": "facts",
    "forget": {"filter": {"family": "harbour"}},
    "method": "npo",
    "parameters": {"lr": 1e-4, "epochs": 40, "batch": 4, "most_rise": 100},
    "relearn_steps": 0,
    "report_rows": 4,
}


def test_a_job_that_is_killed_ends_in_the_same_bytes(start: Start, tiny_model_dir: Path, tmp_path: Path) -> None:
    first = start()
    first.api.register(tiny_model_dir)
    must(first.api.upload(jsonl(rows())), 201)
    broken, whole = (must(first.api.post("/unlearn", json=REQUEST), 202)["job"]["id"] for _ in range(2))
    kept = tmp_path / "data/artifacts" / broken / "training/state.safetensors"
    until(kept.is_file, bool)
    first.end(signal.SIGKILL)
    assert not (kept.parents[1] / "adapter").exists(), "it was killed in the middle of the training"

    second = start()
    jobs = [second.api.wait(one) for one in (broken, whole)]
    assert [(job["state"], job["attempts"]) for job in jobs] == [("succeeded", 2), ("succeeded", 1)]
    folders = [tmp_path / "data/artifacts" / one for one in (broken, whole)]
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json", "weights.jsonl", "losses.jsonl"):
        mine, other = ((folder / name).read_bytes() for folder in folders)
        assert mine == other, name
    steps = [json.loads(line)["step"] for line in (folders[0] / "losses.jsonl").read_text().splitlines()]
    assert steps == list(range(1, jobs[0]["result"]["steps"] + 1))
