"""A valuation that is killed in mid-work ends with the same scores."""

import json
import signal
from pathlib import Path

from tests.api.harness import Api, jsonl, must, rows, until
from tests.operation.process import Start

ROWS = 320
REQUEST = {
    "model": "tiny",
    "candidates": "pool",
    "validation": "held",
    "normalize": "unit",
    "method": "alinfik",
    "label_rows": 250,
    "student": {"layers": 1},
    "ensemble": 2,
    "budget": 5_000,
}
FILES = ("scores.parquet", "scores.csv", "scores.jsonl", "prices.json")


def ready(api: Api, model_dir: Path) -> None:
    api.register(model_dir)
    must(api.upload(jsonl(rows(ROWS)), "pool"), 201)
    must(api.upload(jsonl(rows(4, start=5000)), "held"), 201)


def submit(api: Api) -> str:
    return str(must(api.post("/valuation", json=REQUEST), 202)["job"]["id"])


def blocks(folder: Path, stage: str) -> int:
    """Finished pieces of a stage."""
    return len(list((folder / "work").glob(f"{stage}-*.safetensors")))


def test_a_valuation_that_is_killed_ends_with_the_same_scores(
    start: Start, tiny_model_dir: Path, tmp_path: Path
) -> None:
    first = start()
    ready(first.api, tiny_model_dir)
    broken, whole = submit(first.api), submit(first.api)
    folders = [tmp_path / "data/artifacts" / one for one in (broken, whole)]
    until(lambda: blocks(folders[0], "labels"), lambda done: done >= 2)
    first.end(signal.SIGKILL)
    assert not (folders[0] / "report.json").exists(), "it was killed while it labelled"

    second = start()
    jobs = [second.api.wait(one) for one in (broken, whole)]
    assert [(job["state"], job["attempts"]) for job in jobs] == [("succeeded", 2), ("succeeded", 1)]
    for name in FILES:
        mine, other = ((folder / name).read_bytes() for folder in folders)
        assert mine == other, name
    pages = [must(second.api.get(f"/valuations/{one}/scores", params={"limit": ROWS})) for one in (broken, whole)]
    assert pages[0] == pages[1]
    assert len(pages[0]["items"]) == ROWS
    report, unbroken = (json.loads((folder / "report.json").read_bytes()) for folder in folders)
    assert {**report, "seconds": None} == {**unbroken, "seconds": None}
