"""The corpus reader: what it takes, what it refuses, and where."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from app.influence.corpus import Encoder, Example, Message, parse_row, read_rows, row_from_json
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


def tokens(example: Example, tokenizer: Any) -> str:
    """The text that the targets make."""
    return str(tokenizer.decode([example.ids[position] for position in example.positions]))


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "Yes, one."},
    {"role": "user", "content": "Two?"},
    {"role": "assistant", "content": "No."},
]


def test_every_assistant_turn_counts_with_the_mark_that_closes_it(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    example = Encoder(tokenizer).encode(parse_row({"messages": CHAT}))
    assert tokens(example, tokenizer) == "Yes, one.</s>No.</s>"


@pytest.mark.parametrize(
    ("template", "before"),
    [("chat", "<s>user\nWho?</s><s>assistant\n"), ("alpaca", "### Response:\n"), ("plain", "Who?\n")],
)
def test_a_prompt_and_a_response_in_each_template(tiny_model_dir: Path, template: Any, before: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    encoder = Encoder(tokenizer, template)
    example = encoder.encode(parse_row({"prompt": "Who?", "response": "Orla does."}))
    assert tokens(example, tokenizer) == "Orla does.</s>"
    asked, start = encoder.encode_query((Message("user", "Who?"),), "Orla does.")
    assert tokens(asked, tokenizer) == "Orla does."  # a generation may have been cut off: no closing mark
    assert asked.text[start:] == "Orla does." and asked.text[:start].endswith(before)
    assert encoder.prefix((Message("user", "Who?"),)) == asked.text[:start]


def test_all_of_a_plain_text_counts_but_what_has_no_prefix(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    example = Encoder(tokenizer).encode(parse_row({"text": "once upon"}))
    assert tokens(example, tokenizer) in ("once upon", "nce upon")  # by whether the tokenizer adds a first token


def test_what_does_not_fit_is_cut_and_counted(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    whole = Encoder(tokenizer).encode(parse_row({"text": "abcdefghij"}))
    cut = Encoder(tokenizer, max_length=6).encode(parse_row({"text": "abcdefghij"}))
    assert (cut.ids, cut.truncated) == (whole.ids[:6], len(whole.ids) - 6)


def test_a_template_that_rewrites_earlier_turns_is_refused(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}\n"
        "{% if loop.last %}{{ m.content }}{% else %}{{ m.content[-4:] }}{% endif %}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
    )
    with pytest.raises(RowError, match="rewrites"):
        Encoder(tokenizer).encode(parse_row({"messages": CHAT}))


@pytest.mark.parametrize("kind", ["json", "csv", "parquet", "jsonl"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    records = [
        {"prompt": f'Q{i}, "quoted"?', "response": "a" * 200_000 if i else "é\nx", "n": str(i)} for i in range(3)
    ]
    path = tmp_path / f"rows.{kind}"
    if kind == "json":
        path.write_text(json.dumps(records), encoding="utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(json.dumps(record) for record in records), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(records[0]))
            writer.writeheader()
            writer.writerows(records)
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path)
    rows = list(read_rows(path))
    assert [row.id for row in rows] == [parse_row(record).id for record in records]
    assert [row.metadata for row in rows] == [{"n": str(i)} for i in range(3)]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", "not JSON"),
        ("a.json", b"{}", "list"),
        ("a.json", b"\xff", "UTF-8"),
        ("a.csv", b"prompt,response\nq,a,more\n", "cells"),
        ("a.csv", b"prompt,response\nq,\xff\n", "UTF-8"),
        ("a.parquet", b"not parquet", "Parquet"),
        ("a.txt", b"hello", "kind of file"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RowError, match=words):
        list(read_rows(tmp_path / name))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)  # the first text that it makes takes a second
@given(
    st.dictionaries(
        st.sampled_from(["prompt", "response", "text", "messages", "instruction", "output", "extra"]),
        st.none()
        | st.text()
        | st.integers()
        | st.lists(st.dictionaries(st.sampled_from(["role", "content"]), st.text())),
    )
)
def test_whatever_a_row_is_it_is_read_or_refused(record: dict[str, Any]) -> None:
    try:
        row = parse_row(record)
    except RowError:
        return
    assert row_from_json(row.to_json()).id == row.id
