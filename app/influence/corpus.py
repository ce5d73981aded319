"""Rows to token ids and a mask of the tokens whose loss counts.

A row is stored as chat messages or as plain text, whatever columns it came in; its id is a hash of that text alone,
so the same sample has the same id in every dataset and every index. 63 bits: the id is FAISS's int64 label too.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from app.influence.arrow import read_arrow
from app.influence.errors import QueryError, RowError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Template = Literal["auto", "chat", "alpaca", "plain"]

ALPACA_PREAMBLE = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
ROLES = ("system", "user", "assistant", "tool")
CANONICAL = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class Columns:
    """Where a file keeps what, when its names are not among those that `parse_row` knows."""

    prompt: str | None = None
    input: str | None = None
    response: str | None = None
    messages: str | None = None
    text: str | None = None


@dataclass(frozen=True)
class Row:
    """A training sample: the messages of a chat whose last turn is the assistant's, or one plain text.

    Plain text is kept as a single message of role "text". `metadata` holds every other column.
    """

    messages: tuple[Message, ...]
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def number(self) -> int:
        """The id as a non-negative 63-bit integer (FAISS's label)."""
        digest = hashlib.sha256(self.to_json().encode()).digest()
        return int.from_bytes(digest[:8], "big") >> 1

    @property
    def id(self) -> str:
        """16 hex digits, the content hash."""
        return f"{self.number:016x}"

    @property
    def is_text(self) -> bool:
        """Plain text, not a chat."""
        return self.messages[0].role == "text"

    @property
    def prompt(self) -> str:
        """What came before the response, for people to read."""
        return "\n".join(message.content for message in self.messages[:-1])

    @property
    def response(self) -> str:
        """The last turn, or the whole of a plain text."""
        return self.messages[-1].content

    def to_json(self) -> str:
        """The canonical record: the same text always gives the same bytes."""
        if self.is_text:
            record: dict[str, Any] = {"text": self.messages[0].content}
        else:
            record = {"messages": [{"role": m.role, "content": m.content} for m in self.messages]}
        return CANONICAL.encode(record)


def row_from_json(text: str, metadata: Mapping[str, Any] | None = None) -> Row:
    """The row that `Row.to_json` wrote."""
    row = parse_row(json.loads(text))
    return Row(row.messages, metadata or {})


# The column names that people use, in the order in which they are tried.
KNOWN = (
    Columns(messages="messages"),
    Columns(messages="conversations"),
    Columns(prompt="instruction", input="input", response="output"),  # Alpaca
    Columns(prompt="instruction", input="context", response="response"),  # Dolly
    Columns(prompt="instruction", response="response"),
    Columns(prompt="prompt", response="response"),
    Columns(prompt="prompt", response="completion"),
    Columns(prompt="question", response="answer"),
    Columns(text="text"),
)


def parse_row(record: Mapping[str, Any], columns: Columns | None = None) -> Row:
    """One record of a file as a row.

    Args:
        record: Alpaca, Dolly, prompt/response, question/answer, chat `messages` or plain `text` columns.
        columns: the names to use instead; the columns that it does not name become metadata.

    Raises:
        RowError: no known columns, a missing or empty response, a chat that does not end with the assistant.
    """
    if not isinstance(record, Mapping):
        raise RowError(f"a row is a JSON object, this is {type(record).__name__}")
    if columns is None:
        columns = next((c for c in KNOWN if _fits(record, c)), None)
        if columns is None:
            columns = _nearest(record)
    used = [name for name in (columns.prompt, columns.input, columns.response, columns.messages, columns.text) if name]
    metadata = {key: value for key, value in record.items() if key not in used}
    if columns.messages:
        return Row(_messages(record, columns.messages), metadata)
    if columns.text:
        return Row((Message("text", _text(record, columns.text)),), metadata)
    if not columns.prompt or not columns.response:
        raise RowError("name a prompt and a response column, or a messages or a text column", field="columns")
    prompt = _text(record, columns.prompt)
    extra = record.get(columns.input) if columns.input else None
    if extra is not None and not isinstance(extra, str):
        raise RowError(f"'{columns.input}' is not text", field=columns.input)
    if extra and extra.strip():
        prompt = f"{prompt}\n\n{extra}"
    return Row((Message("user", prompt), Message("assistant", _text(record, columns.response))), metadata)


def _fits(record: Mapping[str, Any], columns: Columns) -> bool:
    needed = [columns.prompt, columns.input, columns.response, columns.messages, columns.text]
    return all(name in record for name in needed if name)


def _nearest(record: Mapping[str, Any]) -> Columns:
    """Say what is missing rather than that nothing fitted."""
    for prompt in ("instruction", "prompt", "question"):
        if prompt in record:
            raise RowError(
                f"the row has '{prompt}' but no response: add 'response', 'output', 'completion' or 'answer'",
                field="response",
            )
    found = ", ".join(sorted(map(str, record))) or "none"
    raise RowError(
        f"no known columns (found: {found}); use prompt and response, messages, or text, or name your columns",
        field="columns",
    )


def _text(record: Mapping[str, Any], name: str) -> str:
    if name not in record:
        raise RowError(f"the row has no '{name}'", field=name)
    value = record[name]
    if not isinstance(value, str):
        raise RowError(f"'{name}' is not text", field=name)
    if not value.strip():
        raise RowError(f"'{name}' is empty", field=name)
    _encodable(value, name)
    return value


def _encodable(value: str, name: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON's \ud800 lets through
        raise RowError(f"'{name}' holds a lone surrogate, which no text encoding can write", field=name) from None


def _messages(record: Mapping[str, Any], name: str) -> tuple[Message, ...]:
    turns = record.get(name)
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise RowError(f"'{name}' is not a list of messages", field=name)
    messages = []
    for number, turn in enumerate(turns):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else (None, None)
        if role not in ROLES or not isinstance(content, str):
            raise RowError(
                f"message {number} needs a role ({', '.join(ROLES)}) and a text content", field=f"{name}.{number}"
            )
        _encodable(content, f"{name}.{number}.content")
        messages.append(Message(role, content))
    if messages[-1].role != "assistant" or not messages[-1].content.strip():
        raise RowError("the last message must be a non-empty one of the assistant", field=name)
    return tuple(messages)


def read_rows(path: Path, columns: Columns | None = None) -> Iterator[Row]:
    """The rows of a .jsonl, .json, .csv or .parquet file, or of a folder of Hugging Face datasets, one at a time.

    Raises:
        RowError: with the 1-based line (of JSONL and CSV) or record number.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Any]]]] = {
        ".jsonl": _read_jsonl,
        ".ndjson": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
    }
    reader = read_arrow if path.is_dir() else readers.get(path.suffix.lower())
    if reader is None:
        raise RowError(f"'{path.name}': this kind of file is not read; use {', '.join(sorted(readers))}", field="file")
    for line, record in reader(path):
        try:
            yield parse_row(record, columns)
        except RowError as error:
            raise RowError(error.detail, field=error.field, line=line) from error


def _read_jsonl(path: Path) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                yield line, json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise RowError(f"not UTF-8 (byte {error.start})", field="file", line=line) from error
            except (ValueError, RecursionError) as error:
                raise RowError(f"not JSON: {error}", field="file", line=line) from error


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    try:
        records = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise RowError(f"not UTF-8 (byte {error.start})", field="file") from error
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON: {error}", field="file") from error
    if not isinstance(records, list):
        raise RowError("a .json file is one list of rows; one object a line is .jsonl", field="file")
    yield from enumerate(records, start=1)


def _read_csv(path: Path) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # the body's limit is the limit, not 128 KiB a cell
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        try:
            for record in reader:
                extra = record.pop(None, None)  # DictReader's name for surplus cells
                if extra is not None:
                    raise RowError("more cells than the header has columns", field="file", line=reader.line_num)
                yield reader.line_num, record
        except UnicodeDecodeError as error:
            raise RowError(f"not UTF-8 (byte {error.start})", field="file", line=reader.line_num + 1) from error
        except csv.Error as error:
            raise RowError(f"not CSV: {error}", field="file", line=reader.line_num) from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    import pyarrow  # here, since most readers never meet Parquet and the import takes a while
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            line = 0
            for batch in file.iter_batches(batch_size=1024):
                for record in batch.to_pylist():
                    line += 1
                    yield line, record
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # the disk's; Arrow's own, for bad bytes, has none
            raise
        raise RowError(f"not Parquet: {str(error) or type(error).__name__}", field="file") from error


@dataclass(frozen=True)
class Example:
    """A row as the model sees it.

    Attributes:
        ids: token ids.
        targets: for each position, whether the loss of predicting this token counts (never at position 0).
        offsets: (start, end) characters of each token in `text`.
        text: the rendered text.
        truncated: how many tokens were cut off at the end.
    """

    ids: tuple[int, ...]
    targets: tuple[bool, ...]
    offsets: tuple[tuple[int, int], ...]
    text: str
    truncated: int = 0

    @property
    def positions(self) -> list[int]:
        """Where the targets are."""
        return [i for i, counts in enumerate(self.targets) if counts]


class Encoder:
    """Renders rows and queries by one template and marks the response tokens.

    The rendered text is tokenised once and the response found by character offsets, so tokens that the tokenizer
    merges across the border are the ones that training saw.

    Args:
        template: "chat" is the tokenizer's own, "alpaca" the published instruction text, "plain" prompt and response
            with a newline between; "auto" takes "chat" where the tokenizer has one, else "alpaca".
        max_length: tokens; what lies beyond is cut off and counted in `Example.truncated`.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template = "auto", max_length: int = 1024) -> None:
        if not tokenizer.is_fast:
            raise QueryError(
                "the tokenizer gives no character offsets: a fast tokenizer (tokenizer.json) is needed", field="model"
            )
        if template == "auto":
            template = "chat" if tokenizer.chat_template else "alpaca"
        if template == "chat" and not tokenizer.chat_template:
            raise QueryError("the tokenizer has no chat template; choose 'alpaca' or 'plain'", field="template")
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length

    def encode(self, row: Row) -> Example:
        """A training row: every assistant turn counts, with the mark that closes it.

        Raises:
            RowError: no response token is left within `max_length`, or the chat template refuses the row.
        """
        text, spans = self._render(row.messages, closing=True)
        example = self._tokenise(text, spans, row.is_text)
        if not any(example.targets):
            raise RowError(f"row {row.id}: no response token within max_length={self.max_length}", field="max_length")
        return example

    def encode_query(self, prompt: Sequence[Message], generation: str) -> tuple[Example, int]:
        """A prompt and what was generated, and the character at which the generation begins in the rendered text.

        Unlike a training row, a generation has no closing mark: it may have been cut off by a token limit.

        Raises:
            QueryError: an empty generation, or one that does not fit `max_length`.
        """
        if not generation.strip():
            raise QueryError("the generation is empty: there is nothing to attribute", field="generation")
        try:
            generation.encode()
            turn = Message("assistant", generation) if prompt else Message("text", generation)
            text, spans = self._render((*prompt, turn), closing=False)
        except (RowError, UnicodeEncodeError) as error:
            raise QueryError(str(error), field="prompt") from error
        example = self._tokenise(text, spans[-1:], not prompt)
        if example.truncated:
            total = len(example.ids) + example.truncated
            raise QueryError(
                f"prompt and generation are {total} tokens, the limit is {self.max_length}", field="generation"
            )
        if not any(example.targets):
            raise QueryError(
                "the generation has no token that the model predicts (its first token has no prefix)",
                field="generation",
            )
        return example, spans[-1][0]

    def prefix(self, prompt: Sequence[Message]) -> str:
        """The text after which the model writes its answer."""
        if not prompt:
            return ""
        return self._render((*prompt, Message("assistant", "")), closing=False)[0]

    def _render(self, messages: Sequence[Message], closing: bool) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the (start, end) characters of each assistant turn in it."""
        if messages[0].role == "text":
            return messages[0].content, [(0, len(messages[0].content))]
        if self.template == "chat":
            return self._render_chat(messages, closing)
        text, spans = ALPACA_PREAMBLE if self.template == "alpaca" else "", []
        heads = {"system": "", "user": "### Instruction:\n", "tool": "### Input:\n", "assistant": "### Response:\n"}
        for number, message in enumerate(messages):
            text += heads[message.role] if self.template == "alpaca" else ""
            start = len(text)
            text += message.content
            last = number == len(messages) - 1
            if message.role == "assistant":
                if closing:
                    text += self.tokenizer.eos_token or ""
                spans.append((start, len(text)))
            if not last:
                text += "\n\n" if self.template == "alpaca" else "\n"
        return text, spans

    def _render_chat(self, messages: Sequence[Message], closing: bool) -> tuple[str, list[tuple[int, int]]]:
        if not closing:  # a query: its last turn alone counts
            before = self._apply(messages[:-1], add_generation_prompt=True)
            text = before + messages[-1].content
            return text, [(len(before), len(text))]
        text, spans = "", []
        for number, message in enumerate(messages):
            if message.role != "assistant":
                continue
            before = self._apply(messages[:number], add_generation_prompt=True)
            rewritten = text and not before.startswith(text.rstrip())  # an earlier turn is no longer what it was
            text = self._apply(messages[: number + 1])
            here = text[len(before) :]
            if rewritten or not text.startswith(before.rstrip()) or message.content.strip() not in here:
                detail = "the tokenizer's chat template rewrites earlier turns, so the response cannot be located"
                raise RowError(detail, field="messages")
            spans.append((len(before), len(text.rstrip())))
        return text, spans

    def _apply(self, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
        turns = [{"role": m.role, "content": m.content} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template is a program of the model's author: any error is its verdict on the row
            raise RowError(
                f"the tokenizer's chat template refuses these messages: {error}", field="messages"
            ) from error
        return str(text)

    def special(self, plain: bool) -> bool:
        """Whether the tokenizer adds its own first token: a chat template writes it itself."""
        return plain or self.template != "chat"

    def _tokenise(self, text: str, spans: Sequence[tuple[int, int]], plain: bool) -> Example:
        encoded = self.tokenizer(text, add_special_tokens=self.special(plain), return_offsets_mapping=True)
        ids: list[int] = encoded["input_ids"]
        offsets: list[tuple[int, int]] = [(int(a), int(b)) for a, b in encoded["offset_mapping"]]
        targets = [
            position > 0 and any(start < max(b, a + 1) and a < end for start, end in spans) and b > a
            for position, (a, b) in enumerate(offsets)
        ]
        kept = self.max_length
        return Example(tuple(ids[:kept]), tuple(targets[:kept]), tuple(offsets[:kept]), text, max(0, len(ids) - kept))
