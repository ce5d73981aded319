"""Rows in bulk into PostgreSQL: COPY, which takes them as a stream instead of one statement for each batch."""

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

SAMPLES = "COPY samples (dataset_id, ordinal, row_id, record, metadata) FROM STDIN"
PAUSE = 1_000  # rows; writing into a socket that has room never lets others on the event loop have a turn


@dataclass(frozen=True)
class NewSample:
    """A row on its way in: stable id, canonical record, metadata."""

    row_id: str
    record: str
    extra: dict[str, Any]


async def copy_samples(session: AsyncSession, dataset_id: str, samples: Sequence[NewSample]) -> None:
    """Store a dataset's samples in the session's transaction.

    Raises:
        DBAPIError: what the driver refuses, as SQLAlchemy would have raised it.
    """
    rows = (
        (dataset_id, ordinal, sample.row_id, sample.record, json.dumps(sample.extra, ensure_ascii=False))
        for ordinal, sample in enumerate(samples)
    )
    await copy_rows(session, SAMPLES, rows)


async def copy_rows(session: AsyncSession, statement: str, rows: Iterable[Sequence[Any]]) -> None:
    """Send rows, in the order of the statement's columns, in the session's transaction.

    Raises:
        DBAPIError: what the driver refuses, as SQLAlchemy would have raised it.
    """
    raw = await (await session.connection()).get_raw_connection()
    driver = raw.driver_connection
    assert isinstance(driver, psycopg.AsyncConnection)
    try:
        async with driver.cursor() as cursor, cursor.copy(statement.encode()) as copy:
            for number, row in enumerate(rows):
                await copy.write_row(row)
                if number % PAUSE == 0:
                    await asyncio.sleep(0)
    except psycopg.Error as error:
        raise DBAPIError.instance(statement, None, error, psycopg.Error) from error
