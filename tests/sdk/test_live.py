"""The SDK against the service: every job, page, file and refusal, blocking and awaiting."""

import inspect
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import pytest_asyncio

from headwater_client import AsyncClient, Client, errors, models
from tests.api.harness import Api, jsonl, rows

ANSWER = "The mill number 2 is green."


def test_a_generation_is_explained(client: Client) -> None:
    answer = client.influence(index="idx", prompt="What colour is the mill number 2?", generation=ANSWER, top_k=3)
    assert [hit.score for hit in answer.proponents] == sorted((hit.score for hit in answer.proponents), reverse=True)
    assert "".join(token.text for token in answer.tokens) == ANSWER
    assert len(answer.token_means) == len(answer.tokens)
    assert answer.definition.normalize == "unit"


def test_a_batch_answers_each_query_or_says_why_not(client: Client) -> None:
    found = client.influence_batch("idx", [{"prompt": "Where?", "generation": "north"}, {"generation": " "}])
    assert found.items[0].answer
    assert found.items[1].problem
    assert found.items[1].problem.errors[0].field == "queries.1.generation"


def test_a_logged_chat_is_explained(client: Client) -> None:
    said = {"choices": [{"message": {"role": "assistant", "content": ANSWER}}]}
    asked = {"messages": [{"role": "user", "content": "What colour is the mill number 2?"}]}
    both = client.influence_chat("idx", request=asked, response=said)
    line = client.influence_chat("idx", logged=json.dumps({"request": asked, "response": said}))
    assert [hit.id for hit in both.proponents] == [hit.id for hit in line.proponents]


def test_the_whole_way_from_rows_to_an_unlearnt_model(client: Client, tiny_model_dir: Path, tmp_path: Path) -> None:
    model = client.models.create("way", str(tiny_model_dir), dtype="float32")
    assert client.models.get("way").fingerprint == model.fingerprint
    assert "way" in [one.name for one in client.models.list(limit=1)]
    dataset = client.datasets.upload("way", rows(8))
    assert (dataset.rows, client.datasets.get("way").content_hash) == (8, dataset.content_hash)
    seen: list[models.JobInfo] = []
    job = client.indexes.build("way", "way", "way", projection={"kind": "kronecker", "size": 4})
    index = job.wait(progress=seen.append, timeout=120).result()
    assert (index.state, index.rows, seen[-1].state) == ("ready", 8, "succeeded")
    assert client.indexes.add("way", rows=[{"prompt": "Where?", "response": "north"}]).result(120).rows == 9
    first = next(client.datasets.samples("way", filter={"family": "mill"}))
    assert first.metadata == {"family": "mill"}
    assert client.indexes.remove("way", [first.id]).rows == 8
    asked = client.indexes.get("way")
    assert asked in [client.indexes.get(one.id) for one in client.indexes.list()]

    preview = client.preview_unlearn({"filter": {"family": "tower"}}, index="way")
    assert preview.forget.count == 2
    options: Any = {"method": "ga", "parameters": {"epochs": 1.0}, "relearn_steps": 0, "report_rows": 2}
    unlearning = client.unlearn({"filter": {"family": "tower"}}, index="way", register_as="forgot", **options)
    assert unlearning.accepted.forget == 2
    assert unlearning.wait(timeout=240).result()
    files = unlearning.artifacts()
    assert "adapter/adapter_config.json" in {one.path for one in files}
    fetched = unlearning.download(tmp_path / "made")
    assert {path.relative_to(tmp_path / "made").as_posix(): path.stat().st_size for path in fetched} == {
        one.path: one.bytes for one in files
    }
    assert unlearning.read("report.json") == (tmp_path / "made" / "report.json").read_bytes()
    assert client.models.get("forgot").name == "forgot"
    client.models.delete("forgot")

    client.indexes.delete("way")
    client.datasets.delete("way")
    client.models.delete("way")
    with pytest.raises(errors.NotFound) as refused:
        client.models.get("way")
    assert (refused.value.status, refused.value.slug) == (404, "not-found")
    assert refused.value.request_id


def test_rows_are_valued_and_chosen(client: Client) -> None:
    client.datasets.upload("pool", rows(6, start=40))
    client.datasets.upload("wanted", rows(3, start=60))
    job = client.valuations.create("tiny", "pool", "wanted")
    found = job.result(timeout=240)
    assert found.id == job.id
    assert found.summary
    assert found.summary.rows == 6
    scores = list(client.valuations.scores(job.id, order="asc", limit=2))
    assert [score.rank for score in scores] == [6, 5, 4, 3, 2, 1]
    chosen = client.valuations.select(job.id, 2, positive=False)
    assert [row.id for row in chosen.rows] == [scores[-1].id, scores[-2].id]
    assert job.id in [one.id for one in client.valuations.list()]
    assert job.id == client.jobs.get(job.id).wait().id


def test_pages_are_walked_to_their_end(client: Client) -> None:
    assert [sample.ordinal for sample in client.datasets.samples("facts", limit=5)] == list(range(12))
    assert len(list(client.jobs.list(limit=1))) >= 1


def test_events_end_with_the_end_of_the_job(client: Client) -> None:
    job = client.indexes.build("watched", "tiny", "facts")
    seen = list(job.events())
    assert seen[-1].state == "succeeded"
    assert [info.version for info in seen] == sorted({info.version for info in seen})
    assert job.state == "succeeded"
    with pytest.raises(errors.Conflict):
        job.cancel()


def test_a_cancelled_job_says_so_and_can_be_run_again(service: Api, client: Client) -> None:
    job = client.indexes.build("stopped", "tiny", "facts", projection={"kind": "kronecker", "size": 8})
    try:
        job.cancel()
    except errors.Conflict:  # it was quicker
        assert job.refresh().state == "succeeded"
        return
    with pytest.raises(errors.JobCancelled):
        job.wait(timeout=60)
    assert job.retry().wait(timeout=120).result().state == "ready"


@pytest.mark.parametrize("kind", ["path", "bytes", "open file", "records"])
def test_rows_are_sent_however_they_are_kept(client: Client, tmp_path: Path, kind: str) -> None:
    path, content = tmp_path / "rows.jsonl", jsonl(rows(3, start=100))
    path.write_bytes(content)
    name = f"sent-{kind.replace(' ', '-')}"
    with path.open("rb") as file:
        sources: dict[str, Any] = {"path": path, "bytes": content, "open file": file, "records": rows(3, start=100)}
        made = client.datasets.upload(name, sources[kind], duplicates="skip")
    assert made.rows == 3


def test_columns_are_renamed_on_the_way(client: Client) -> None:
    made = client.datasets.upload("renamed", [{"q": "Where?", "a": "north"}], columns={"prompt": "q", "response": "a"})
    assert next(client.datasets.samples("renamed")).record["messages"][0]["content"] == "Where?"
    assert made.columns == {"prompt": "q", "response": "a"}


def test_a_file_on_the_server_is_registered(client: Client, service: Api) -> None:
    folder = service.app.state.services.settings.data_dir
    (folder / "there.jsonl").write_bytes(jsonl(rows(2, start=200)))
    assert client.datasets.create("there", str(folder / "there.jsonl")).rows == 2


def test_a_refusal_names_the_fields_at_fault(client: Client) -> None:
    with pytest.raises(errors.InvalidRequest) as refused:
        client.influence("idx", prompt="x", top_k=0)
    assert refused.value.fields == ("top_k",)
    with pytest.raises(errors.BadQuery):
        client.influence("idx", prompt="x", generation=" ")
    with pytest.raises(errors.AlreadyExists):
        client.indexes.build("idx", "tiny", "facts")
    with pytest.raises(errors.InvalidRequest) as unknown:
        client.influence("idx", prompt="x", extra={"colour": "blue"})
    assert unknown.value.fields == ("colour",)


def test_the_service_says_that_it_lives(client: Client) -> None:
    assert client.is_alive().status == client.is_ready().status == "ok"
    assert "headwater_http_requests_total" in client.metrics()


def test_address_and_key_come_from_the_environment(service: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HEADWATER_URL", str(service.base_url))
    monkeypatch.setenv("HEADWATER_API_KEY", "hw_secret")
    with Client() as client:
        assert client.is_alive().status == "ok"
        assert client._http.headers["Authorization"] == "Bearer hw_secret"
        assert "hw_secret" not in repr(client)


def test_a_locked_service_says_that_a_key_is_needed(asked_locked: Api) -> None:
    with Client(str(asked_locked.base_url)) as client, pytest.raises(errors.Unauthorized, match="API key"):
        next(client.models.list())


@pytest_asyncio.fixture
async def awaiting(service: Api) -> AsyncIterator[AsyncClient]:
    """In this process, with no socket between."""
    transport = httpx2.ASGITransport(service.app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1") as http:
        yield AsyncClient(http=http)


async def test_the_awaiting_client_asks_and_pages(awaiting: AsyncClient, client: Client) -> None:
    query: Any = {"prompt": "What colour is the mill number 2?", "generation": ANSWER}
    answer = await awaiting.influence("idx", **query)
    assert [hit.id for hit in answer.proponents] == [hit.id for hit in client.influence("idx", **query).proponents]
    assert [sample.ordinal async for sample in awaiting.datasets.samples("facts", limit=5)] == list(range(12))
    with pytest.raises(errors.NotFound):
        await awaiting.models.get("nobody")


async def test_the_awaiting_client_follows_a_job(service: Api, tmp_path: Path) -> None:
    async with AsyncClient(str(service.base_url)) as client:
        job = await client.indexes.build("awaited", "tiny", "facts")
        states = [info.state async for info in job.events()]
        assert states[-1] == "succeeded"
        assert (await job.result(timeout=60)).state == "ready"
        again = await (await client.jobs.get(job.id)).wait()
        assert (await again.refresh()).id == job.id
        assert await again.artifacts() == []
        assert await again.download(tmp_path) == []
        with pytest.raises(errors.NotFound):
            await again.read("nothing")
        with pytest.raises(errors.Conflict):
            await again.cancel()
        with pytest.raises(errors.Conflict):
            await again.retry()


async def test_the_blocking_client_works_where_a_loop_runs(service: Api) -> None:
    """As in a notebook."""
    with Client(str(service.base_url)) as client:
        assert [one.name for one in client.indexes.list() if one.name == "idx"] == ["idx"]


def test_methods_have_the_words_and_the_arguments_of_their_operations(client: Client) -> None:
    assert "page" in (inspect.getdoc(client.models.list) or "")
    assert list(inspect.signature(client.datasets.upload).parameters)[:2] == ["name", "rows"]
    assert {"index", "top_k", "span", "extra"} <= set(inspect.signature(client.influence).parameters)


def test_no_variable_of_the_tests_leads_elsewhere() -> None:
    assert "HEADWATER_URL" not in os.environ
