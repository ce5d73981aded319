"""The service keeps to its OpenAPI document, whatever it is sent: schemathesis, with all of its checks."""

import functools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.api.examples import ROW
from app.catalog.types import Scope
from tests.api.conftest import Mint, quick
from tests.api.harness import ENDED, Api, jsonl, must, rows, serving, until

CONFIG = Path(__file__).with_name("schemathesis.toml")
LIMIT_S = 600  # on a machine that does much else besides; 30 s on one that does not
pytestmark = [pytest.mark.parametrize("backend", ["sqlite"], indirect=True), pytest.mark.timeout(2 * LIMIT_S)]


@pytest.fixture
def fuzzed(tmp_path: Path, tiny_model_dir: Path, mint: Mint) -> Iterator[tuple[Api, str]]:
    """A service that needs keys, with the things that the document's examples name, and a key to all of it."""
    settings = quick(tmp_path, tiny_model_dir.parent, log_level="CRITICAL")
    with serving(settings) as api:
        api.register(tiny_model_dir, "smollm2-veld")
        must(api.upload(jsonl(rows()), "veld-facts"), 201)
        heldout = [{**row, "task": row["family"]} for row in rows(6, start=20)]
        must(api.upload(jsonl(heldout), "veld-heldout"), 201)
        job = api.wait(api.build("facts", "smollm2-veld", "veld-facts")["job"]["id"])
        assert job["state"] == "succeeded", job
    with serving(settings.model_copy(update={"auth": "on"})) as api:
        yield api, mint("fuzz", Scope.ADMIN)


@pytest.fixture
def schemathesis(fuzzed: tuple[Api, str], tmp_path: Path) -> Callable[..., None]:
    """Run it with some options; the test fails with its report."""
    api, key = fuzzed

    def run(*options: str) -> None:
        program = (sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIG))
        given = (f"{api.base_url}/openapi.json", "--header", f"Authorization: Bearer {key}", "--checks", "all")
        command = (*program, "run", *given, "--seed", "1", "--warnings", "off", "--no-color", *options)
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "No issues found" in done.stdout

    return run


def test_every_operation_keeps_to_the_document(schemathesis: Callable[..., None]) -> None:
    phases = ("--phases", "examples,coverage,fuzzing", "--max-examples", "3")
    schemathesis(*phases, "--exclude-method", "DELETE")  # first, since what is deleted answers nothing but 404
    schemathesis(*phases, "--include-method", "DELETE")


def test_sequences_of_operations_keep_to_the_document(schemathesis: Callable[..., None]) -> None:
    schemathesis("--phases", "stateful", "--max-examples", "15")


ELSEWHERE = ("create_model", "create_dataset", "select_rows")
"""Operations whose examples name paths on a server, or a valuation that is done."""


def test_the_examples_succeed_and_are_what_is_fuzzed(fuzzed: tuple[Api, str]) -> None:
    api, key = fuzzed
    seen = must(api.get("/datasets/veld-facts/samples", headers={"X-API-Key": key}))["items"]
    succeeded = set()
    for path, operations in must(api.get("/openapi.json"))["paths"].items():
        for method, operation in operations.items():
            shown = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("examples", {})
            for summary, example in shown.items():
                if operation["operationId"] in ELSEWHERE:
                    continue
                row = seen[operation["operationId"] != "remove_samples"]["id"]  # what is removed is not unlearnt
                body = json.loads(json.dumps(example["value"]).replace(ROW, row))
                url = path.format(index="facts")
                answer = api.request(method, url, json=body, headers={"X-API-Key": key})
                assert answer.is_success, (summary, answer.text)
                succeeded.add(operation["operationId"])
                if answer.status_code == 202:
                    job = answer.json()["job"]["id"]
                    look = functools.partial(api.get, f"/jobs/{job}", headers={"X-API-Key": key})
                    ended = until(look, lambda found: found.json()["state"] in ENDED).json()
                    assert ended["state"] == "succeeded", (summary, ended["error"])
    assert {"value_rows", "unlearn_rows", "query_influence", "query_chat_completion", "create_index"} <= succeeded
