"""Reading rows in: a file, or rows in a request, become samples; bounded in number, duplicates found."""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.api.schemas.datasets import Duplicates, InlineRow
from app.catalog.copying import NewSample
from app.catalog.tables import Dataset
from app.catalog.types import new_id
from app.influence.corpus import Columns, Row, parse_row, read_rows
from app.influence.errors import RowError
from app.problems import Refusal

NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")  # as JSON writes it; PostgreSQL's JSONB has no room for it

METADATA = json.JSONEncoder(default=str, allow_nan=False, ensure_ascii=False)


@dataclass(frozen=True)
class Ingested:
    """What a source of rows came to."""

    samples: Sequence[NewSample]
    duplicates: int

    def dataset(self, name: str, source: str, columns: dict[str, str]) -> Dataset:
        """The dataset that holds it."""
        digest = hashlib.sha256("\n".join(sample.row_id for sample in self.samples).encode())
        return Dataset(
            id=new_id("dst"),
            name=name,
            source=source,
            columns=columns,
            rows=len(self.samples),
            duplicates_skipped=self.duplicates,
            content_hash=digest.hexdigest(),
        )


def read_file(path: Path, columns: Columns | None, duplicates: Duplicates, max_rows: int) -> Ingested:
    """The rows of a file; slow, so call it in a thread."""
    return _collect(read_rows(path, columns), duplicates, max_rows)


def read_inline(rows: Sequence[InlineRow], duplicates: Duplicates, max_rows: int) -> Ingested:
    """The rows of a request."""
    return _collect((_parse_inline(place, row) for place, row in enumerate(rows)), duplicates, max_rows)


def _parse_inline(place: int, row: InlineRow) -> Row:
    record = row.model_dump(exclude_none=True, exclude={"metadata"})
    try:
        return parse_row({**row.metadata, **record})
    except RowError as error:
        raise RowError(error.detail, field=f"rows.{place}" + (f".{error.field}" if error.field else "")) from error


def _collect(rows: Iterable[Row], duplicates: Duplicates, max_rows: int) -> Ingested:
    samples: dict[str, NewSample] = {}
    skipped = 0
    for number, row in enumerate(rows, start=1):
        row_id = row.id  # a hash of the whole text
        if row_id in samples:
            if duplicates == "error":
                first = list(samples).index(row_id) + 1
                detail = f"row {number} has the same text as row {first}; send duplicates=skip to leave such rows out"
                raise RowError(detail, field=f"row {number}")
            skipped += 1
            continue
        if len(samples) == max_rows:
            raise Refusal(413, "too-many-rows", f"a dataset may have at most {max_rows:,} rows", field="rows")
        samples[row_id] = NewSample(row_id, row.to_json(), _metadata(row, number))
    if not samples:
        raise RowError("there are no rows", field="rows")
    return Ingested(list(samples.values()), skipped)


def _metadata(row: Row, number: int) -> dict[str, Any]:
    """The row's other columns as JSON can hold them: Parquet has dates and decimals, which become text."""
    try:
        written = METADATA.encode(dict(row.metadata))
        written.encode()
    except ValueError as error:
        raise RowError(f"row {number} has metadata that JSON cannot hold: {error}", field=f"row {number}") from error
    if NUL.search(written):
        raise RowError(f"row {number} has a NUL character in its metadata: leave it out", field=f"row {number}")
    kept: dict[str, Any] = json.loads(written)
    return kept
