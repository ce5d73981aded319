"""The repository of valuations: their jobs, and the scores that pages are read from by rank."""

from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass

from sqlalchemy import and_, delete, func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased
from sqlalchemy.sql import ColumnElement

from app.catalog.copying import copy_rows
from app.catalog.datasets import CHUNK
from app.catalog.errors import Conflict, NotFound
from app.catalog.filters import Condition, where
from app.catalog.pages import Page, newest_first
from app.catalog.tables import Job, Sample, ValuationScore
from app.catalog.types import JobKind, JobState

COLUMNS = ("rank", "row_id", "value", "uncertainty", "labelled", "tokens", "price")
COPY = f"COPY valuation_scores (job_id, validation_group, {', '.join(COLUMNS)}) FROM STDIN"


@dataclass(frozen=True)
class Score:
    """What a row is worth to a group: its place among the others (1 is the best), its value, what that rests on.

    Attributes:
        uncertainty: standard deviation of an ensemble's predictions; None where it was not predicted.
        labelled: the value is the model's own, not a student's.
        price: in whole units; None without a price split.
    """

    rank: int
    row_id: str
    value: float
    uncertainty: float | None
    labelled: bool
    tokens: int
    price: int | None


class Valuations:
    """Jobs that value rows, and what they found."""

    def __init__(self, session: AsyncSession) -> None:
        self._session = session

    @property
    def _dialect(self) -> str:
        return self._session.get_bind().dialect.name

    async def get(self, job_id: str) -> Job:
        """The valuation's job, as it is in the database now."""
        job = await self._session.get(Job, job_id, populate_existing=True)
        if job is None or job.kind is not JobKind.VALUATION:
            raise NotFound(f"there is no valuation {job_id!r}", field="valuation")
        return job

    async def finished(self, job_id: str) -> Job:
        """The valuation's job, if it has scores."""
        job = await self.get(job_id)
        if job.state is not JobState.SUCCEEDED:
            raise Conflict(f"valuation {job_id} is {job.state}: it has no scores", field="valuation")
        return job

    async def page(self, limit: int, cursor: str | None) -> Page[Job]:
        """Valuations, newest first."""
        return await newest_first(self._session, Job, Job.kind == JobKind.VALUATION, limit=limit, cursor=cursor)

    async def common(self, one: str, other: str) -> int:
        """How many rows two datasets share."""
        theirs = aliased(Sample)
        pairs = select(func.count()).select_from(Sample).join(theirs, theirs.row_id == Sample.row_id)
        return await self._session.scalar(pairs.where(Sample.dataset_id == one, theirs.dataset_id == other)) or 0

    async def store(self, job_id: str, group: str, scores: Sequence[Score]) -> None:
        """Keep a run of ranks; what was kept under these ranks before goes, so that it may be done twice."""
        if not scores:
            return
        ranks = ValuationScore.rank.between(scores[0].rank, scores[-1].rank)
        await self._session.execute(delete(ValuationScore).where(*_of(job_id, group), ranks))
        if self._dialect == "postgresql":
            await copy_rows(self._session, COPY, ((job_id, group, *astuple(score)) for score in scores))
            return
        for start in range(0, len(scores), CHUNK):
            values = [
                {"job_id": job_id, "validation_group": group, **asdict(score)}
                for score in scores[start : start + CHUNK]
            ]
            await self._session.execute(insert(ValuationScore), values)

    async def scores(
        self,
        job_id: str,
        group: str,
        limit: int,
        after: int | None,
        *,
        ascending: bool = False,
        conditions: Sequence[Condition] = (),
        dataset_id: str | None = None,
    ) -> Page[tuple[Score, Sample | None]]:
        """A group's scores behind a rank, the best first (`ascending`: the worst), each with its row if that still is.

        Args:
            conditions: what the row's metadata must be; they need the dataset.
        """
        columns = [getattr(ValuationScore, name) for name in COLUMNS]
        mine = and_(Sample.dataset_id == (dataset_id or ""), Sample.row_id == ValuationScore.row_id)
        query = select(*columns, Sample).join(Sample, mine, isouter=not conditions).where(*_of(job_id, group))
        query = query.where(*where(conditions, self._dialect))
        if after is not None:
            query = query.where(ValuationScore.rank < after if ascending else ValuationScore.rank > after)
        order = ValuationScore.rank.desc() if ascending else ValuationScore.rank
        rows = (await self._session.execute(query.order_by(order).limit(limit + 1))).all()
        found = [(Score(*row[:-1]), row[-1]) for row in rows]
        return Page(found[:limit], str(found[limit - 1][0].rank) if len(found) > limit else None)

    async def ranked(
        self, job_id: str, group: str, conditions: Sequence[Condition] = (), dataset_id: str | None = None
    ) -> Sequence[Score]:
        """All of a group's scores whose rows meet the conditions, the best first."""
        columns = [getattr(ValuationScore, name) for name in COLUMNS]
        query = select(*columns).where(*_of(job_id, group), *where(conditions, self._dialect))
        if conditions:
            mine = and_(Sample.dataset_id == (dataset_id or ""), Sample.row_id == ValuationScore.row_id)
            query = query.join(Sample, mine)
        rows = await self._session.execute(query.order_by(ValuationScore.rank))
        return [Score(*row) for row in rows.all()]


def _of(job_id: str, group: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    return ValuationScore.job_id == job_id, ValuationScore.validation_group == group
