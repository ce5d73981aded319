"""The laws of the repositories: unique names, keyset pages, moves between states that only one writer can win."""

import asyncio
from datetime import UTC, datetime, timedelta, timezone

import pytest
from sqlalchemy.exc import IntegrityError

from app.catalog.catalog import Catalog
from app.catalog.database import Database
from app.catalog.datasets import NewSample
from app.catalog.errors import AlreadyExists, NotFound
from app.catalog.tables import Dataset, IndexRow, Job, Model
from app.catalog.types import JobKind, JobState, new_id

pytestmark = pytest.mark.asyncio
DAY = timedelta(days=1)


def dataset(name: str) -> Dataset:
    return Dataset(id=new_id("dst"), name=name, source="here", columns={}, rows=0, content_hash="0")


def job() -> Job:
    return Job(id=new_id("job"), kind=JobKind.BUILD_INDEX, params={})


async def add_job(catalog: Catalog) -> str:
    made = job()
    await catalog.jobs.add(made)
    await catalog.commit()
    return made.id


async def test_a_name_is_unique_and_an_id_is_found_by_either(database: Database) -> None:
    async with database.catalog() as catalog:
        made = dataset("facts")
        await catalog.datasets.add(made, [])
        assert (await catalog.datasets.get("facts")).id == (await catalog.datasets.get(made.id)).id
        with pytest.raises(AlreadyExists):
            await catalog.datasets.add(dataset("facts"), [])
        with pytest.raises(NotFound):
            await catalog.datasets.get("other")


async def test_what_is_not_committed_is_not_kept(database: Database) -> None:
    async with database.catalog() as catalog:
        await catalog.datasets.add(dataset("facts"), [NewSample("a", "{}", {})])
    async with database.catalog() as catalog:
        assert not (await catalog.datasets.page(10, None)).items


async def test_pages_do_not_shift_when_something_is_added(database: Database) -> None:
    async with database.catalog() as catalog:
        for number in range(5):
            await catalog.datasets.add(dataset(f"d{number}"), [])
        first = await catalog.datasets.page(2, None)
        await catalog.datasets.add(dataset("new"), [])
        second = await catalog.datasets.page(2, first.next_cursor)
        last = await catalog.datasets.page(2, second.next_cursor)
    assert [one.name for page in (first, second, last) for one in page.items] == ["d4", "d3", "d2", "d1", "d0"]
    assert last.next_cursor is None


async def test_samples_come_back_in_order_over_several_inserts(database: Database) -> None:
    samples = [NewSample(f"{number:016x}", f'{{"n":{number}}}', {"n": number}) for number in range(1201)]
    async with database.catalog() as catalog:
        made = dataset("facts")
        await catalog.datasets.add(made, samples)
        await catalog.commit()
        assert list(await catalog.datasets.records(made.id)) == [sample.record for sample in samples]
        page = await catalog.datasets.samples(made.id, 10, after=1195)
    assert [sample.extra["n"] for sample in page.items] == [1196, 1197, 1198, 1199, 1200]


async def test_times_come_back_aware_and_in_utc(database: Database) -> None:
    made = dataset("facts")
    made.created_at = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=2)))
    async with database.catalog() as catalog:
        await catalog.datasets.add(made, [])
        await catalog.commit()
    async with database.catalog() as catalog:
        assert (await catalog.datasets.get("facts")).created_at == datetime(2026, 1, 1, 10, tzinfo=UTC)


async def test_a_job_moves_only_from_where_it_is(database: Database) -> None:
    async with database.catalog() as catalog:
        job_id = await add_job(catalog)
        assert not await catalog.jobs.finish(job_id, JobState.SUCCEEDED)
        assert await catalog.jobs.start(job_id, again=True)
        assert await catalog.tasks.take(job_id, "one", 60, 0)
        assert not await catalog.jobs.cancel_idle(job_id)
        assert await catalog.jobs.finish(job_id, JobState.FAILED)
        assert not await catalog.jobs.start(job_id, again=True)
        assert not await catalog.jobs.request_cancel(job_id)
        assert await catalog.jobs.retry(job_id)
        found = await catalog.jobs.get(job_id)
    assert (found.state, found.attempts, found.version) == (JobState.QUEUED, 1, 4)


async def test_of_two_who_cancel_at_once_one_wins(database: Database) -> None:
    async with database.catalog() as catalog:
        job_id = await add_job(catalog)

    async def cancel() -> bool:
        async with database.catalog() as catalog:
            won = await catalog.jobs.cancel_idle(job_id)
            await catalog.commit()
            return won

    assert sorted(await asyncio.gather(cancel(), cancel())) == [False, True]


async def test_one_unfinished_job_works_on_an_index(database: Database) -> None:
    async with database.catalog() as catalog:
        facts = dataset("facts")
        await catalog.datasets.add(facts, [])
        model = Model(id=new_id("mdl"), name="m", spec={}, fingerprint={}, attributed=[], skipped=[], context_length=1)
        index = IndexRow(id=new_id("idx"), name="i", model=model, dataset=facts, dataset_id=facts.id, spec={})
        await catalog.indexes.add(index)
        await catalog.commit()
    made = []
    for _ in range(2):
        one = job()
        one.index_id = index.id
        made.append(one)

    async def submit(one: Job) -> bool:
        try:
            async with database.catalog() as catalog:
                await catalog.jobs.add(one)
                await catalog.commit()
        except IntegrityError:
            return False
        return True

    assert sorted(await asyncio.gather(*map(submit, made))) == [False, True]


async def test_an_idempotency_key_has_one_owner(database: Database) -> None:
    async with database.catalog() as catalog:
        assert await catalog.keys.claim("k", "hash", DAY) is None
    async with database.catalog() as catalog:
        held = await catalog.keys.claim("k", "hash", DAY)
        assert held is not None
        assert held.status is None
        await catalog.keys.answer("k", 201, {}, "body")
        await catalog.commit()
    async with database.catalog() as catalog:
        kept = await catalog.keys.claim("k", "hash", DAY)
        assert kept is not None
        assert (kept.status, kept.body) == (201, "body")
    async with database.catalog() as catalog:
        assert await catalog.keys.claim("k", "other", timedelta(0)) is None, "an expired key is free again"


async def test_a_claim_whose_process_died_is_released_and_an_answer_is_kept(database: Database) -> None:
    async with database.catalog() as catalog:
        for key in ("answered", "died"):
            await catalog.keys.claim(key, "hash", DAY)
        await catalog.keys.answer("answered", 201, {}, "body")
        await catalog.keys.release_unanswered()
        await catalog.commit()
    async with database.catalog() as catalog:
        assert await catalog.keys.claim("died", "hash", DAY) is None
        assert await catalog.keys.claim("answered", "hash", DAY) is not None
