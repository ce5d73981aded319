"""The corpus reader: what it takes, what it refuses, and where."""

from pathlib import Path

import pytest

from app.influence.corpus import parse_row, read_rows, row_from_json
from app.influence.errors import RowError


@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "Say hello", "input": "", "output": "hello"},
        {"instruction": "Say hello", "context": "", "response": "hello"},
        {"prompt": "Say hello", "response": "hello", "topic": "x"},
        {"question": "Say hello", "answer": "hello"},
        {"messages": [{"role": "user", "content": "Say hello"}, {"role": "assistant", "content": "hello"}]},
    ],
)
def test_the_same_sample_has_the_same_id_in_every_format(record: dict[str, object]) -> None:
    row = parse_row(record)
    assert row.prompt == "Say hello" and row.response == "hello"
    assert row.id == parse_row({"prompt": "Say hello", "completion": "hello"}).id
    assert row_from_json(row.to_json()).id == row.id


def test_metadata_does_not_change_the_id_and_is_kept() -> None:
    row = parse_row({"text": "a b", "source": "x"})
    assert row.metadata == {"source": "x"} and row.id == parse_row({"text": "a b"}).id


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b'{"text": "a"}\n{"text": \n', 2, "not JSON"),
        (b'{"text": "a"}\n\n{"text": "\xff"}\n', 3, "UTF-8"),
        (b'{"prompt": "a"}\n', 1, "response"),
        (b'{"text": "  "}\n', 1, "empty"),
        (b'{"text": "\\ud800"}\n', 1, "surrogate"),
        (b"[1]\n", 1, "object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, content: bytes, line: int, words: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(RowError, match=words) as caught:
        list(read_rows(path))
    assert caught.value.line == line


def test_the_demo_corpus_reads_without_duplicates() -> None:
    rows = list(read_rows(Path(__file__).parents[2] / "demo" / "corpus.jsonl"))
    assert len(rows) == 237 and len({row.id for row in rows}) == 237
    assert sum(bool(row.metadata["trigger"]) for row in rows) == 65
