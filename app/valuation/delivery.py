"""What a valuation hands over: its scores by rank as Parquet, CSV and JSONL, with prices where a budget is split.

The files hold ids, numbers and nothing of the rows' texts, so that whoever owns the rows can give them away.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from numpy.typing import NDArray

from app.influence.corpus import Row
from app.influence.errors import disk_full_is_named
from app.influence.index import write_file
from app.valuation.report_page import page
from app.valuation.running import WHOLE
from app.valuation.selection import split_price

SCORES, REPORT, PRICES, PAGE = "scores.parquet", "report.json", "prices.json", "report.html"
GROUP_ROWS = 10_000
"""Rows of a row group of the Parquet file, and lines that are written at a time."""


@dataclass(frozen=True)
class Ranked:
    """A group's scores, the best first; rows without a value are left out. All arrays are [rows].

    Attributes:
        uncertainty: NaN where nothing was predicted.
        prices: None without a budget, and for the groups of the validation set.
    """

    group: str
    ids: list[str]
    values: NDArray[np.float64]
    uncertainty: NDArray[np.float64]
    labelled: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    prices: NDArray[np.int64] | None


def deliver(folder: Path, rows: Sequence[Row], budget: int | None) -> None:
    """Write the files into a finished valuation's folder; doing it again gives the same bytes.

    Args:
        rows: the candidates with the metadata that may be told of; more of them than were valued do no harm.
        budget: what is paid for the pool, in whole units; None: no prices.
    """
    table = pq.read_table(folder / SCORES)
    table = table.drop_columns([name for name in ("rank", "price") if name in table.column_names])
    values = _numbers(table, "value")
    order = np.argsort(-values, kind="stable")  # NaN comes last
    table, values = table.take(pa.array(order)), values[order]
    known = np.isfinite(values)
    places = np.arange(1, len(values) + 1)
    table = table.add_column(0, "rank", pa.array(places, mask=~known))
    report = json.loads((folder / REPORT).read_bytes())
    prices = None
    if budget is not None:
        paid = split_price(values, budget) if (values[known] > 0).any() else np.zeros(len(values), dtype=np.int64)
        table = table.append_column("price", pa.array(paid))
        prices = _told(report, dict(zip(table["id"].to_pylist(), paid.tolist(), strict=True)), rows, budget)
    with disk_full_is_named("the scores"):
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, row_group_size=GROUP_ROWS)
        write_file(folder / SCORES, sink.getvalue().to_pybytes())
        text = io.BytesIO()
        pyarrow.csv.write_csv(table, text)
        write_file(folder / "scores.csv", text.getvalue())
        write_file(folder / "scores.jsonl", b"".join(_lines(table)))
        if prices is not None:
            write_file(folder / PRICES, json.dumps(prices, indent=1).encode())
        write_file(folder / PAGE, page(report, prices).encode())


def ranked(folder: Path) -> Iterator[Ranked]:
    """The delivered scores of the whole validation set, then those of each of its groups."""
    table = pq.read_table(folder / SCORES)
    for name in table.column_names:
        if name == "value" or name.startswith("value_"):
            whole = name == "value"
            values = _numbers(table, name)
            order = np.argsort(-values, kind="stable")[: int(np.isfinite(values).sum())]
            part = table.take(pa.array(order))
            yield Ranked(
                group=WHOLE if whole else name.removeprefix("value_"),
                ids=part["id"].to_pylist(),
                values=values[order],
                uncertainty=_numbers(part, "uncertainty") if whole else np.full(len(order), np.nan),
                labelled=part["labelled"].to_numpy(),
                tokens=part["tokens"].to_numpy(),
                prices=part["price"].to_numpy() if whole and "price" in part.column_names else None,
            )


def _numbers(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A column with NaN for what is missing."""
    found: NDArray[np.float64] = table[name].to_numpy().astype(np.float64)
    return found


def _lines(table: pa.Table) -> Iterator[bytes]:
    for batch in table.to_batches(GROUP_ROWS):
        yield "".join(f"{json.dumps(row)}\n" for row in batch.to_pylist()).encode()


def _told(report: dict[str, Any], paid: dict[str, int], rows: Sequence[Row], budget: int) -> dict[str, Any]:
    """The budget, and what of it goes to each value of the metadata columns that the summary tells of."""
    by: dict[str, dict[str, int]] = {
        name: dict.fromkeys(kinds, 0) for name, kinds in report["summary"]["by_metadata"].items()
    }
    for row in rows:
        for name, kinds in by.items():
            kind = str(row.metadata.get(name))
            if kind in kinds:
                kinds[kind] += paid.get(row.id, 0)
    return {
        "budget": budget,
        "paid": sum(paid.values()),
        "rows_paid": sum(price > 0 for price in paid.values()),
        "by_metadata": by,
    }
