"""Scoring a file with an exported student: what whoever owns the rows runs, without the model and without a service."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

import pyarrow as pa
import pyarrow.parquet as pq

from app.influence.corpus import Columns, Row, read_rows
from app.influence.errors import RowError, SpecError
from app.valuation.running import WHOLE
from app.valuation.student import ABOUT, Student

BLOCK = 512
"""Rows in memory at a time."""
Write = Callable[[Sequence[dict[str, Any]]], None]


def score_file(student: Student, rows: Path, out: Path, columns: Columns | None = None) -> Iterator[int]:
    """Write id, value and uncertainty of each row of a file, and its value for each group; yields rows done so far.

    Args:
        out: .csv, .jsonl or .parquet; it is there when all rows are.

    Raises:
        SpecError: another kind of output. RowError: no rows, or one that cannot be used, with its line.
    """
    if out.suffix not in WRITERS:
        raise SpecError(f"'{out.name}': write .csv, .jsonl or .parquet", field="out")
    others = [(at, name) for at, name in enumerate(student.groups) if name != WHOLE]
    part = out.with_name(f"{out.name}.part")
    source, done = read_rows(rows, columns), 0
    try:
        with WRITERS[out.suffix](part) as write:
            while block := list(islice(source, BLOCK)):
                write(_scored(student, block, others))
                done += len(block)
                yield done
        if not done:
            raise RowError("there are no rows", field="file")
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)


def is_trusted(folder: Path) -> bool:
    """Whether the report of whoever made the student trusts its order; `load_student` has said that it is one."""
    return bool(json.loads((folder / ABOUT).read_bytes())["report"]["trusted"])


def _scored(student: Student, rows: Sequence[Row], others: Sequence[tuple[int, str]]) -> list[dict[str, Any]]:
    values, uncertainty = student.score(rows)
    return [
        {
            "id": row.id,
            "value": float(values[at, 0]),
            "uncertainty": float(uncertainty[at, 0]),
            **{f"value_{name}": float(values[at, group]) for group, name in others},
        }
        for at, row in enumerate(rows)
    ]


@contextmanager
def _csv(path: Path) -> Iterator[Write]:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer: csv.DictWriter[str] | None = None

        def write(scored: Sequence[dict[str, Any]]) -> None:
            nonlocal writer
            if writer is None:
                writer = csv.DictWriter(file, list(scored[0]))
                writer.writeheader()
            writer.writerows(scored)

        yield write


@contextmanager
def _jsonl(path: Path) -> Iterator[Write]:
    with path.open("w", encoding="utf-8") as file:
        yield lambda scored: _write_lines(file, scored)


def _write_lines(file: TextIO, scored: Sequence[dict[str, Any]]) -> None:
    file.writelines(f"{json.dumps(one)}\n" for one in scored)


@contextmanager
def _parquet(path: Path) -> Iterator[Write]:
    writer: pq.ParquetWriter | None = None

    def write(scored: Sequence[dict[str, Any]]) -> None:
        nonlocal writer
        table = pa.Table.from_pylist(list(scored))
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)

    try:
        yield write
    finally:
        if writer is not None:
            writer.close()


WRITERS = {".csv": _csv, ".jsonl": _jsonl, ".parquet": _parquet}
