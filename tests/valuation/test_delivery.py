"""What a valuation hands over: ranks, prices and a page, the same however often they are made."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from app.influence.corpus import Row, parse_row
from app.valuation.delivery import deliver, ranked
from app.valuation.summary import summary
from app.valuation.wording import word_vectors

VALUES = [0.5, -1.0, None, 2.0, 0.5]
ROWS = [
    parse_row({"prompt": f"What is {n}?", "response": f"It is {n}.", "kind": "<b>" if n % 2 else "plain"})
    for n in range(len(VALUES))
]


def made(folder: Path, values: list[float | None]) -> list[Row]:
    """A finished valuation's folder."""
    rows = ROWS[: len(values)]
    folder.mkdir(parents=True, exist_ok=True)
    table = {
        "id": [row.id for row in rows],
        "value": pa.array(values, pa.float64()),
        "uncertainty": pa.array([None] * len(rows), pa.float64()),
        "labelled": [True] * len(rows),
        "tokens": list(range(1, len(rows) + 1)),
        "value_tea": pa.array([None if value is None else -value for value in values], pa.float64()),
    }
    pq.write_table(pa.table(table), folder / "scores.parquet")
    found = summary(rows, np.array(values, dtype=np.float64))
    report = {"method": "linfik", "normalize": "unit", "warnings": ["a < b"], "summary": found}
    (folder / "report.json").write_text(json.dumps(report))
    return rows


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_rows_are_ranked_paid_and_written_once(tmp_path: Path) -> None:
    rows = made(tmp_path, VALUES)
    deliver(tmp_path, rows, 120)
    table = pq.read_table(tmp_path / "scores.parquet").to_pylist()
    assert [(row["rank"], row["value"], row["price"]) for row in table] == [
        (1, 2.0, 80),
        (2, 0.5, 20),
        (3, 0.5, 20),
        (4, -1.0, 0),
        (None, None, 0),
    ]
    assert [row["id"] for row in table[1:3]] == [ROWS[0].id, ROWS[4].id], "of equals the earlier first"
    told = json.loads((tmp_path / "prices.json").read_bytes())
    assert (told["paid"], told["rows_paid"]) == (120, 3)
    assert told["by_metadata"] == {"kind": {"<b>": 80, "plain": 40}}
    once = files(tmp_path)
    deliver(tmp_path, rows, 120)
    assert files(tmp_path) == once


def test_each_group_has_ranks_of_its_own(tmp_path: Path) -> None:
    deliver(tmp_path, made(tmp_path, VALUES), None)
    whole, tea = ranked(tmp_path)
    assert (whole.group, whole.values.tolist(), whole.prices) == ("all", [2.0, 0.5, 0.5, -1.0], None)
    assert (tea.group, tea.values.tolist()) == ("tea", [1.0, -0.5, -0.5, -2.0])
    assert tea.ids[0] == whole.ids[-1]
    assert whole.tokens.tolist() == [4, 1, 5, 2]


@pytest.mark.parametrize("values", [[-1.0, -2.0], [0.0], [3.0, 3.0]])
def test_any_values_have_files_and_a_page(tmp_path: Path, values: list[float | None]) -> None:
    deliver(tmp_path, made(tmp_path, values), 10)
    paid = json.loads((tmp_path / "prices.json").read_bytes())["paid"]
    assert paid == (10 if max(value or 0 for value in values) > 0 else 0)
    assert "<svg" in (tmp_path / "report.html").read_text()


def test_the_page_shows_what_it_is_given_as_text(tmp_path: Path) -> None:
    deliver(tmp_path, made(tmp_path, VALUES), 100)
    page = (tmp_path / "report.html").read_text()
    assert "&lt;b&gt;" in page and "a &lt; b" in page
    assert "<b>" not in page


def test_texts_are_alike_by_their_words() -> None:
    same, near, far, nothing = (
        vector / max(float(np.linalg.norm(vector)), 1e-9)
        for vector in word_vectors(["the mill by the river", "the mill by the hill", "soot in water makes ink", "?!"])
    )
    assert same @ same == pytest.approx(1)
    assert 0.2 < same @ near < 1
    assert abs(same @ far) < 0.2
    assert not nothing.any()
