"""A fit of EK-FAC factors that is killed with SIGKILL goes on from its sums and ends with the same bytes."""

import signal
from pathlib import Path

from tests.api.harness import Api, jsonl, must, rows, until
from tests.operation.process import Start

ROWS = 120


def files(path: Path) -> dict[str, bytes]:
    found = {file.name: file.read_bytes() for file in (path / "ekfac").iterdir()}
    return found | {"ekfac.json": (path / "ekfac.json").read_bytes()}


def fit(api: Api) -> str:
    return str(must(api.post("/indexes/idx/ekfac"), 202)["job"]["id"])


def test_a_fit_that_is_killed_ends_with_the_same_factors(start: Start, tiny_model_dir: Path, tmp_path: Path) -> None:
    first = start()
    first.api.register(tiny_model_dir)
    must(first.api.upload(jsonl(rows(ROWS))), 201)
    first.api.wait(first.api.build()["job"]["id"])
    path = tmp_path / "data/indexes" / must(first.api.get("/indexes/idx"))["id"]
    broken = fit(first.api)
    until(  # the bases are there, and the second pass over the rows has begun
        lambda: first.api.job(broken)["progress"],
        lambda now: now and now["stage"] == "eigenvalues" and now["done"] > 10,
    )
    first.end(signal.SIGKILL)
    assert not (path / "ekfac.json").exists()
    assert list((path / "ekfac").glob("sums-*"))

    second = start()
    job = second.api.wait(broken)
    assert (job["state"], job["attempts"]) == ("succeeded", 2), job
    interrupted = files(path)
    assert not [name for name in interrupted if name.startswith("sums-")]
    second.api.wait(fit(second.api))
    assert files(path) == interrupted, "as by a fit that nothing interrupted"
    ask = {"index": "idx", "prompt": rows(1)[0]["prompt"], "generation": rows(1)[0]["response"], "rerank": "ekfac"}
    assert must(second.api.post("/influence", json=ask))["proponents"]
