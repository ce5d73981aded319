"""What a job made can be listed and fetched, and nothing else."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.catalog.database import Database
from app.catalog.tables import Job
from app.catalog.types import JobKind, JobState, new_id
from tests.api.conftest import quick
from tests.api.harness import Api, must, problem, serving

FILES = {
    "adapter/adapter_model.safetensors": b"\0" * 40,
    "losses.jsonl": b'{"step": 1}\n',
    "report.html": b"<p>forgotten</p>",
    "report.json": b"{}",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="module")
def api(folder: Path) -> Iterator[Api]:
    """One service on SQLite for all of them: files do not depend on where the catalog is."""
    with serving(quick(folder)) as api:
        yield api


@pytest.fixture
def job(api: Api, folder: Path) -> Path:
    """The folder of a job that has ended, with files."""
    made = folder / "artifacts" / new_id("job")

    async def add() -> None:
        database = Database(f"sqlite+aiosqlite:///{folder / 'headwater.db'}")
        async with database.catalog() as catalog:
            await catalog.jobs.add(Job(id=made.name, kind=JobKind.VALUATION, state=JobState.SUCCEEDED, params={}))
            await catalog.commit()
        await database.close()

    asyncio.run(add())
    for name, content in FILES.items():
        file = made / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    return made


def test_the_list_names_every_finished_file_and_each_can_be_fetched(api: Api, job: Path) -> None:
    (job / "half.json.0a1b.part").write_bytes(b"{")
    items = must(api.get(f"/jobs/{job.name}/artifacts"))["items"]
    assert {one["path"]: one["bytes"] for one in items} == {name: len(content) for name, content in FILES.items()}
    for one in items:
        answer = api.get(f"/jobs/{job.name}/artifacts/{one['path']}")
        assert (answer.status_code, answer.content) == (200, FILES[one["path"]])
        assert answer.headers["content-type"].partition(";")[0] == one["media_type"]
        assert f'filename="{Path(one["path"]).name}"' in answer.headers["content-disposition"]
    kinds = [one["media_type"] for one in items]
    assert kinds == ["application/octet-stream", "application/x-ndjson", "text/html", "application/json"]


def test_a_page_is_shown_in_a_sandbox_and_everything_else_is_saved(api: Api, job: Path) -> None:
    page, table = (api.get(f"/jobs/{job.name}/artifacts/{name}").headers for name in ("report.html", "report.json"))
    assert page["content-disposition"].startswith("inline")
    assert page["content-security-policy"].startswith("sandbox; default-src 'none'")
    assert table["content-disposition"].startswith("attachment")
    assert table["content-security-policy"].startswith("default-src 'none'; frame")


def test_a_file_that_the_caller_has_is_not_sent_again(api: Api, job: Path) -> None:
    address = f"/jobs/{job.name}/artifacts/report.json"
    etag = api.get(address).headers["etag"]
    again = api.get(address, headers={"If-None-Match": f'"other", {etag}'})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", etag)
    assert api.get(address, headers={"If-None-Match": '"other"'}).content == FILES["report.json"]


def test_a_part_of_a_file_can_be_asked_for(api: Api, job: Path) -> None:
    answer = api.get(f"/jobs/{job.name}/artifacts/report.html", headers={"Range": "bytes=3-8"})
    assert (answer.status_code, answer.content) == (206, b"forgot")


@pytest.mark.parametrize(
    "path",
    [
        "nothing.json",
        "adapter",
        "..%2f..%2fheadwater.db",
        "%2e%2e/%2e%2e/headwater.db",
        "%2fetc%2fpasswd",
        "link",
        "%00",
    ],
)
def test_no_other_file_is_served(api: Api, job: Path, path: str) -> None:
    (job / "link").symlink_to(job.parent)
    problem(api.get(f"/jobs/{job.name}/artifacts/{path}"), 404, "not-found", "path")


def test_a_job_without_files_has_an_empty_list_and_an_unknown_one_none(api: Api, job: Path) -> None:
    job.rename(job.with_name("elsewhere"))
    assert must(api.get(f"/jobs/{job.name}/artifacts"))["items"] == []
    problem(api.get("/jobs/job_nowhere/artifacts"), 404, "not-found", "job")
    problem(api.get("/jobs/job_nowhere/artifacts/report.json"), 404, "not-found", "job")
