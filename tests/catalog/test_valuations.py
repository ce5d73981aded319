"""Scores are kept by rank and read a page at a time; what a dataset is read for keeps it."""

import pytest

from app.catalog.catalog import Catalog
from app.catalog.copying import NewSample
from app.catalog.database import Database
from app.catalog.errors import Conflict, NotFound
from app.catalog.filters import Condition
from app.catalog.tables import Dataset, Job
from app.catalog.types import JobKind, JobState, new_id
from app.catalog.valuations import Score

pytestmark = pytest.mark.asyncio
ROWS = 7


def score(rank: int) -> Score:
    return Score(rank, f"{rank:016x}", 1.0 - rank, None if rank % 2 else 0.25, bool(rank % 2), 10 * rank, rank)


async def add_dataset(catalog: Catalog, name: str, rows: int, start: int = 1) -> Dataset:
    made = Dataset(id=new_id("dst"), name=name, source="here", columns={}, rows=rows, content_hash="0")
    samples = [NewSample(f"{n:016x}", "{}", {"topic": "ab"[n % 2], "n": n}) for n in range(start, start + rows)]
    await catalog.datasets.add(made, samples)
    return made


async def add_job(catalog: Catalog, candidates: Dataset, state: JobState = JobState.SUCCEEDED) -> Job:
    job = Job(id=new_id("job"), kind=JobKind.VALUATION, state=state, params={"candidates": candidates.id})
    await catalog.jobs.add(job)
    return job


@pytest.fixture
async def valued(database: Database) -> tuple[Database, Job, Dataset]:
    """A valuation of seven rows for two groups."""
    async with database.catalog() as catalog:
        pool = await add_dataset(catalog, "pool", ROWS)
        job = await add_job(catalog, pool)
        for group in ("all", "other"):
            await catalog.valuations.store(job.id, group, [score(rank) for rank in range(1, ROWS + 1)])
        await catalog.commit()
    return database, job, pool


@pytest.mark.parametrize("ascending", [False, True])
async def test_pages_give_every_score_once_in_order(valued: tuple[Database, Job, Dataset], ascending: bool) -> None:
    database, job, pool = valued
    found: list[Score] = []
    after: int | None = None
    async with database.catalog() as catalog:
        while True:
            page = await catalog.valuations.scores(job.id, "all", 3, after, ascending=ascending, dataset_id=pool.id)
            assert all(sample is not None and sample.row_id == one.row_id for one, sample in page.items)
            found += [one for one, _ in page.items]
            if page.next_cursor is None:
                break
            after = int(page.next_cursor)
    expected = [score(rank) for rank in range(1, ROWS + 1)]
    assert found == (expected[::-1] if ascending else expected)


async def test_a_filter_goes_through_the_same_pages(valued: tuple[Database, Job, Dataset]) -> None:
    database, job, pool = valued
    wanted = [Condition("topic", "eq", "b"), Condition("n", "gt", 1)]
    async with database.catalog() as catalog:
        page = await catalog.valuations.scores(job.id, "all", 2, None, conditions=wanted, dataset_id=pool.id)
        assert [one.rank for one, _ in page.items] == [3, 5]
        assert page.next_cursor == "5"
        ranked = await catalog.valuations.ranked(job.id, "other", wanted, pool.id)
        assert ranked == [score(3), score(5), score(7)]


async def test_a_run_of_ranks_may_be_stored_twice(valued: tuple[Database, Job, Dataset]) -> None:
    database, job, _ = valued
    async with database.catalog() as catalog:
        await catalog.valuations.store(job.id, "all", [score(rank) for rank in range(3, 6)])
        await catalog.commit()
        assert await catalog.valuations.ranked(job.id, "all") == [score(rank) for rank in range(1, ROWS + 1)]


async def test_scores_outlive_the_rows(valued: tuple[Database, Job, Dataset]) -> None:
    database, job, pool = valued
    async with database.catalog() as catalog:
        await catalog.datasets.remove(pool)
        page = await catalog.valuations.scores(job.id, "all", 10, None, dataset_id=pool.id)
        assert [(one.rank, sample) for one, sample in page.items] == [(rank, None) for rank in range(1, ROWS + 1)]


async def test_a_dataset_that_an_unfinished_valuation_reads_stays(database: Database) -> None:
    async with database.catalog() as catalog:
        pool = await add_dataset(catalog, "pool", 1)
        job = await add_job(catalog, pool, JobState.RUNNING)
        with pytest.raises(Conflict, match=f"job {job.id} reads dataset 'pool'"):
            await catalog.datasets.remove(pool)
        await catalog.jobs.cancel_idle(job.id)
        await catalog.datasets.remove(pool)


async def test_only_a_valuation_that_succeeded_has_scores(database: Database) -> None:
    async with database.catalog() as catalog:
        pool = await add_dataset(catalog, "pool", 1)
        running = await add_job(catalog, pool, JobState.RUNNING)
        other = Job(id=new_id("job"), kind=JobKind.UNLEARN, params={})
        await catalog.jobs.add(other)
        with pytest.raises(Conflict, match="is running: it has no scores"):
            await catalog.valuations.finished(running.id)
        for missing in (other.id, "job_nowhere"):
            with pytest.raises(NotFound, match="there is no valuation"):
                await catalog.valuations.get(missing)
        assert [job.id for job in (await catalog.valuations.page(10, None)).items] == [running.id]


async def test_rows_that_two_datasets_share_are_counted(database: Database) -> None:
    async with database.catalog() as catalog:
        one, other = await add_dataset(catalog, "one", 5), await add_dataset(catalog, "other", 4, start=4)
        assert await catalog.valuations.common(one.id, other.id) == 2
        assert await catalog.valuations.common(other.id, one.id) == 2
