"""The service keeps to its OpenAPI document, whatever it is sent: schemathesis, with all of its checks."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from app.catalog.types import Scope
from tests.api.conftest import Mint, quick
from tests.api.harness import Api, jsonl, must, rows, serving

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


def test_what_the_examples_name_is_really_asked(fuzzed: tuple[Api, str]) -> None:
    api, key = fuzzed
    document = must(api.get("/openapi.json"))
    names = {schema: document["components"]["schemas"][schema]["properties"] for schema in ("InfluenceIn", "IndexIn")}
    assert names["InfluenceIn"]["index"]["examples"] == ["facts"]
    body = {"index": "facts", "prompt": "Who founded the harbour of Veld?", "generation": "Ilse Marn."}
    assert must(api.post("/influence", json=body, headers={"X-API-Key": key}))["tokens"]
    assert names["IndexIn"]["model"]["examples"] == ["smollm2-veld"]
