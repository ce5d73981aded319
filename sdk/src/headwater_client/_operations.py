"""Every operation of the API, described once: the method and the path, how its request is made, what its answer is.

A new operation is one function here, and one line in each client (`client.py`). A function is named as the operation
is in the OpenAPI document, so that a test can hold the two against each other.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, Generic, Literal, ParamSpec, TypeVar, Unpack
from urllib.parse import quote

import httpx2
from pydantic import BaseModel, ValidationError

from headwater_client import fields as given
from headwater_client import models
from headwater_client.errors import UnexpectedAnswer

P = ParamSpec("P")
T = TypeVar("T")
Shape = TypeVar("Shape", bound=BaseModel)
Method = Literal["GET", "POST", "DELETE"]
Rows = str | Path | bytes | BinaryIO | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Request(Generic[T]):
    """What one call sends beside its path, and how its answer is read. `file` is opened anew for each attempt."""

    read: Callable[[httpx2.Response], T]
    path: Mapping[str, str] = field(default_factory=dict)
    query: Mapping[str, Any] = field(default_factory=dict)
    body: Mapping[str, Any] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    file: Callable[[], AbstractContextManager[tuple[str, BinaryIO]]] | None = None


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request that is ready to be sent.

    Attributes:
        repeatable: it may be sent again when nobody knows whether the first was done.
        makes: it makes something, so that it takes an `Idempotency-Key`, which makes it repeatable.
    """

    method: Method
    url: str
    request: Request[T]
    repeatable: bool
    makes: bool


@dataclass(frozen=True)
class Operation(Generic[P, T]):
    """An operation of the API; calling it makes a `Call`."""

    id: str
    method: Method
    path: str
    build: Callable[P, Request[T]]
    makes: bool
    repeatable: bool

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> Call[T]:
        """The call with these arguments."""
        request = self.build(*args, **kwargs)
        # an artifact's path keeps its slashes
        parts = {name: quote(value, safe="/" if name == "path" else "") for name, value in request.path.items()}
        return Call(self.method, self.path.format(**parts), request, self.repeatable, self.makes)


OPERATIONS: list[Operation[Any, Any]] = []


def operation(
    method: Method, path: str, *, makes: bool = False, asks: bool = False, id: str | None = None
) -> Callable[[Callable[P, Request[T]]], Operation[P, T]]:
    """Describe an operation.

    Args:
        makes: it takes an `Idempotency-Key`.
        asks: a POST that changes nothing.
        id: its name in the OpenAPI document, where the function has another.
    """

    def describe(build: Callable[P, Request[T]]) -> Operation[P, T]:
        repeatable = makes or asks or method == "GET"
        made = Operation(id or build.__name__, method, path, build, makes, repeatable)
        OPERATIONS.append(made)
        return made

    return describe


def _as(shape: type[Shape]) -> Callable[[httpx2.Response], Shape]:
    def read(response: httpx2.Response) -> Shape:
        try:
            return shape.model_validate_json(response.content)
        except ValidationError as error:
            why = str(error).replace("\n", " ")[:300]
            raise UnexpectedAnswer(
                f"{response.request.method} {response.request.url} did not answer as Headwater does: {why}"
            ) from error

    read.shape = shape  # type: ignore[attr-defined]
    return read


def _nothing(_response: httpx2.Response) -> None:
    return None


def _text(response: httpx2.Response) -> str:
    return response.text


def _raw(response: httpx2.Response) -> bytes:
    return response.content


def _given(**values: Any) -> dict[str, Any]:
    """Those that were given, with what `extra` has."""
    extra = values.pop("extra", None) or {}
    return {**{name: value for name, value in values.items() if value is not None}, **extra}


def _making(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """The body and the headers of a request that makes something."""
    rest = dict(values)
    key = rest.pop("idempotency_key", None)
    return _given(**rest), {"Idempotency-Key": key} if key else {}


# --- influence


@operation("POST", "/influence", asks=True)
def query_influence(index: str, **fields: Unpack[given.InfluenceFields]) -> Request[models.Influence]:
    """The training rows that made the model say this; without a `generation` the model writes it first."""
    return Request(_as(models.Influence), body=_given(index=index, **fields))


@operation("POST", "/influence/batch", asks=True)
def query_influence_batch(
    index: str, queries: Sequence[given.Query], **fields: Unpack[given.BatchFields]
) -> Request[models.InfluenceBatch]:
    """Many generations asked in the same way; each gets an answer or a problem of its own."""
    return Request(_as(models.InfluenceBatch), body=_given(index=index, queries=queries, **fields))


@operation("POST", "/influence/chat-completion", asks=True)
def query_chat_completion(index: str, **fields: Unpack[given.ChatFields]) -> Request[models.Influence]:
    """The training rows behind a logged chat completion: an OpenAI `request` and `response`, or a `logged` line."""
    return Request(_as(models.Influence), body=_given(index=index, **fields))


# --- models


@operation("POST", "/models", makes=True)
def create_model(name: str, path: str, **fields: Unpack[given.ModelFields]) -> Request[models.Model]:
    """Register a model folder on the server, with its checkpoints."""
    body, headers = _making({"name": name, "path": path, **fields})
    return Request(_as(models.Model), body=body, headers=headers)


@operation("GET", "/models")
def list_models(limit: int | None = None) -> Request[models.Page[models.ModelSummary]]:
    """Registered models, newest first; `limit` is the size of a page."""
    return Request(_as(models.Page[models.ModelSummary]), query=_given(limit=limit))


@operation("GET", "/models/{model}")
def get_model(model: str) -> Request[models.Model]:
    """One model, by its id or name."""
    return Request(_as(models.Model), {"model": model})


@operation("DELETE", "/models/{model}")
def delete_model(model: str) -> Request[None]:
    """Forget a registered model; its files stay where they are."""
    return Request(_nothing, {"model": model})


# --- datasets


@operation("POST", "/datasets", makes=True, id="create_dataset")
def create_dataset(name: str, path: str, **fields: Unpack[given.DatasetFields]) -> Request[models.Dataset]:
    """Register a file, or a folder of Hugging Face `datasets`, that lies on the server."""
    body, headers = _making({"name": name, "path": path, **fields})
    return Request(_as(models.Dataset), body=body, headers=headers)


@operation("POST", "/datasets", makes=True, id="create_dataset")
def upload_dataset(
    name: str, rows: Rows, filename: str | None = None, **fields: Unpack[given.DatasetFields]
) -> Request[models.Dataset]:
    """Send rows: a file of this machine, an open one, its bytes, or a list of records.

    `filename` says of what kind bytes are, by its ending; without one they are taken for JSON lines.
    """
    form, headers = _making(fields)
    if "columns" in form:
        form["columns"] = json.dumps(form["columns"])
    opened = _opener(rows, filename)
    return Request(_as(models.Dataset), body={"name": name, **form}, headers=headers, file=opened)


def _opener(rows: Rows, filename: str | None) -> Callable[[], AbstractContextManager[tuple[str, BinaryIO]]]:
    name = filename or "rows.jsonl"
    if isinstance(rows, str | Path):
        return lambda: _File(Path(rows), filename or Path(rows).name)
    if isinstance(rows, bytes):
        return lambda: nullcontext((name, BytesIO(rows)))
    if isinstance(rows, Sequence):
        lines = "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in rows)
        content = lines.encode()
        return lambda: nullcontext((name, BytesIO(content)))

    def again() -> AbstractContextManager[tuple[str, BinaryIO]]:
        rows.seek(0)
        return nullcontext((name, rows))

    return again


class _File:
    """A file by its path."""

    def __init__(self, path: Path, name: str) -> None:
        self._path, self._name = path, name

    def __enter__(self) -> tuple[str, BinaryIO]:
        self._file = self._path.open("rb")
        return self._name, self._file

    def __exit__(self, *_raised: object) -> None:
        self._file.close()


@operation("GET", "/datasets")
def list_datasets(limit: int | None = None) -> Request[models.Page[models.Dataset]]:
    """Datasets, newest first; `limit` is the size of a page."""
    return Request(_as(models.Page[models.Dataset]), query=_given(limit=limit))


@operation("GET", "/datasets/{dataset}")
def get_dataset(dataset: str) -> Request[models.Dataset]:
    """One dataset, by its id or name."""
    return Request(_as(models.Dataset), {"dataset": dataset})


@operation("DELETE", "/datasets/{dataset}")
def delete_dataset(dataset: str) -> Request[None]:
    """Delete a dataset; a registered file stays where it lies."""
    return Request(_nothing, {"dataset": dataset})


@operation("GET", "/datasets/{dataset}/samples")
def list_samples(
    dataset: str, filter: given.Filter | None = None, limit: int | None = None
) -> Request[models.Page[models.Sample]]:
    """The rows of a dataset, in order; with a filter those whose metadata match."""
    query = _given(limit=limit, filter=None if filter is None else json.dumps(filter))
    return Request(_as(models.Page[models.Sample]), {"dataset": dataset}, query)


# --- indexes


@operation("POST", "/indexes", makes=True)
def create_index(
    name: str, model: str, dataset: str, **fields: Unpack[given.IndexFields]
) -> Request[models.IndexAccepted]:
    """Build an index of a model over a dataset: a job."""
    body, headers = _making({"name": name, "model": model, "dataset": dataset, **fields})
    return Request(_as(models.IndexAccepted), body=body, headers=headers)


@operation("GET", "/indexes")
def list_indexes(limit: int | None = None) -> Request[models.Page[models.IndexSummary]]:
    """Indexes, newest first; `limit` is the size of a page."""
    return Request(_as(models.Page[models.IndexSummary]), query=_given(limit=limit))


@operation("GET", "/indexes/{index}")
def get_index(index: str) -> Request[models.Index]:
    """One index with its manifest, by its id or name."""
    return Request(_as(models.Index), {"index": index})


@operation("DELETE", "/indexes/{index}")
def delete_index(index: str) -> Request[None]:
    """Delete an index and its files."""
    return Request(_nothing, {"index": index})


@operation("POST", "/indexes/{index}/repair", makes=True)
def repair_index(index: str, idempotency_key: str | None = None) -> Request[models.IndexAccepted]:
    """Compute the damaged shards of an index anew: a job."""
    _, headers = _making({"idempotency_key": idempotency_key})
    return Request(_as(models.IndexAccepted), {"index": index}, headers=headers)


@operation("POST", "/indexes/{index}/ekfac", makes=True)
def fit_ekfac(index: str, **fields: Unpack[given.EkfacFields]) -> Request[models.EkfacAccepted]:
    """Fit EK-FAC factors over the rows of an index, for `rerank="ekfac"`: a job."""
    body, headers = _making(fields)
    return Request(_as(models.EkfacAccepted), {"index": index}, body=body, headers=headers)


@operation("POST", "/indexes/{index}/samples", makes=True)
def add_samples(index: str, **fields: Unpack[given.SamplesFields]) -> Request[models.IndexAccepted]:
    """Add the rows of a dataset, or `rows` written here, to an index: a job."""
    body, headers = _making(fields)
    return Request(_as(models.IndexAccepted), {"index": index}, body=body, headers=headers)


@operation("DELETE", "/indexes/{index}/samples")
def remove_samples(index: str, ids: Sequence[str]) -> Request[models.Removed]:
    """Remove rows from an index by their stable ids, at once."""
    return Request(_as(models.Removed), {"index": index}, body={"ids": list(ids)})


# --- unlearning and valuation


@operation("POST", "/unlearn", makes=True)
def unlearn_rows(forget: given.Forget, **fields: Unpack[given.UnlearnFields]) -> Request[models.UnlearnAccepted]:
    """Make a model forget training rows: a job."""
    body, headers = _making({"forget": forget, **fields})
    return Request(_as(models.UnlearnAccepted), body=body, headers=headers)


@operation("POST", "/unlearn", makes=True, id="unlearn_rows")
def preview_unlearn(forget: given.Forget, **fields: Unpack[given.UnlearnFields]) -> Request[models.UnlearnPreview]:
    """What an unlearning would forget and hold, and how long it may take; nothing is done."""
    body, headers = _making({"forget": forget, "dry_run": True, **fields})
    return Request(_as(models.UnlearnPreview), body=body, headers=headers)


@operation("POST", "/valuation", makes=True)
def value_rows(
    model: str, candidates: str, validation: str, **fields: Unpack[given.ValuationFields]
) -> Request[models.ValuationAccepted]:
    """Find what training on each candidate would do to the loss on the validation rows: a job."""
    named = {"model": model, "candidates": candidates, "validation": validation}
    body, headers = _making({**named, **fields})
    return Request(_as(models.ValuationAccepted), body=body, headers=headers)


@operation("GET", "/valuations")
def list_valuations(limit: int | None = None) -> Request[models.Page[models.ValuationSummary]]:
    """Valuations, newest first; `limit` is the size of a page."""
    return Request(_as(models.Page[models.ValuationSummary]), query=_given(limit=limit))


@operation("GET", "/valuations/{valuation}")
def get_valuation(valuation: str) -> Request[models.Valuation]:
    """One valuation with what it found, by its id, which is that of its job."""
    return Request(_as(models.Valuation), {"valuation": valuation})


@operation("GET", "/valuations/{valuation}/scores")
def list_scores(
    valuation: str,
    group: str | None = None,
    order: Literal["desc", "asc"] | None = None,
    filter: given.Filter | None = None,
    limit: int | None = None,
) -> Request[models.Page[models.Score]]:
    """The scores in their order; `desc`: the best rows first."""
    query = _given(group=group, order=order, limit=limit, filter=None if filter is None else json.dumps(filter))
    return Request(_as(models.Page[models.Score]), {"valuation": valuation}, query)


@operation("POST", "/valuation/select", asks=True)
def select_rows(valuation: str, k: int, **fields: Unpack[given.SelectFields]) -> Request[models.Selection]:
    """The best `k` rows that fit a budget of tokens, as different from each other as is asked for."""
    return Request(_as(models.Selection), body=_given(valuation=valuation, k=k, **fields))


# --- jobs


@operation("GET", "/jobs")
def list_jobs(state: str | None = None, limit: int | None = None) -> Request[models.Page[models.JobInfo]]:
    """Jobs, newest first; `limit` is the size of a page."""
    return Request(_as(models.Page[models.JobInfo]), query=_given(state=state, limit=limit))


@operation("GET", "/jobs/{job}")
def get_job(job: str) -> Request[models.JobInfo]:
    """One job, by its id."""
    return Request(_as(models.JobInfo), {"job": job})


@operation("GET", "/jobs/{job}", id="get_job")
def get_result(job: str) -> Request[dict[str, Any]]:
    """What a job made, as it tells it itself."""
    info = _as(models.JobInfo)
    return Request(lambda response: info(response).result or {}, {"job": job})


@operation("GET", "/jobs/{job}/events")
def watch_job(job: str, last_event_id: str = "") -> Request[None]:
    """The job's server-sent events behind that one."""
    return Request(_nothing, {"job": job}, headers={"Last-Event-ID": last_event_id} if last_event_id else {})


@operation("POST", "/jobs/{job}/cancel")
def cancel_job(job: str) -> Request[models.JobInfo]:
    """Cancel a job: at once if it waits, after its step if it runs."""
    return Request(_as(models.JobInfo), {"job": job})


@operation("POST", "/jobs/{job}/retry")
def retry_job(job: str) -> Request[models.JobInfo]:
    """Run a failed or cancelled job again, from where it stopped."""
    return Request(_as(models.JobInfo), {"job": job})


@operation("GET", "/jobs/{job}/artifacts")
def list_artifacts(job: str) -> Request[models.Page[models.Artifact]]:
    """The files that a job has made so far."""
    return Request(_as(models.Page[models.Artifact]), {"job": job})


@operation("GET", "/jobs/{job}/artifacts/{path}")
def get_artifact(job: str, path: str) -> Request[bytes]:
    """One file that a job made."""
    return Request(_raw, {"job": job, "path": path})


# --- health


@operation("GET", "/healthz")
def is_alive() -> Request[models.Health]:
    """The process answers."""
    return Request(_as(models.Health))


@operation("GET", "/readyz")
def is_ready() -> Request[models.Health]:
    """The database answers and has the newest schema."""
    return Request(_as(models.Health))


@operation("GET", "/metrics")
def read_metrics() -> Request[str]:
    """Prometheus' text format."""
    return Request(_text)
