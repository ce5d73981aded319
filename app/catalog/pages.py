"""Keyset paging: a page ends with a cursor that says where the next one starts, however much was added meanwhile."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql import ColumnElement

from app.catalog.tables import Dataset, IndexRow, Job, Model

T = TypeVar("T", Model, Dataset, IndexRow, Job)
Item = TypeVar("Item")


@dataclass(frozen=True)
class Page(Generic[Item]):
    """Some items and where the next ones start (None: these were the last)."""

    items: Sequence[Item]
    next_cursor: str | None


async def newest_first(
    session: AsyncSession, table: type[T], *where: ColumnElement[bool], limit: int, cursor: str | None
) -> Page[T]:
    """A page of a table, newest first; ids sort by the time they were made."""
    query = select(table).where(*where).order_by(table.id.desc()).limit(limit + 1)
    if cursor:
        query = query.where(table.id < cursor)
    found = (await session.scalars(query)).all()
    return Page(found[:limit], found[limit - 1].id if len(found) > limit else None)
