"""Datasets: upload or register training rows, page through them.

One POST takes a file (multipart) or names one on the server (JSON), so the body is parsed here rather than by a FastAPI
parameter; `openapi_extra` documents both forms.
"""

import asyncio
import json
import re
import shutil
from pathlib import Path
from typing import Annotated, Any, BinaryIO, TypeVar

from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from starlette.datastructures import UploadFile

from app.api import paths
from app.api.documents import problems
from app.api.idempotency import IdempotentRoute
from app.api.ingest import Ingested, read_file
from app.api.schemas.common import Listing
from app.api.schemas.datasets import DatasetIn, DatasetOut, DatasetUpload, SampleOut
from app.api.schemas.filters import EXAMPLE, FILTER, parse_text
from app.api.services import Cursor, Limit, Reading, Services, Use
from app.catalog.tables import Dataset
from app.catalog.types import new_id
from app.influence.arrow import arrow_files
from app.influence.corpus import Columns
from app.problems import Refusal

router = APIRouter(prefix="/datasets", tags=["datasets"], route_class=IdempotentRoute)
DatasetRef = Annotated[str, InPath(description="Id or name of a dataset.", examples=["veld-facts"])]
PLACE = re.compile(r"[0-9]{1,15}")
PlaceCursor = Annotated[
    str | None,
    Query(
        description="The `next_cursor` of the page before; left out for the first page.",
        json_schema_extra={"pattern": f"^{PLACE.pattern}$"},
    ),
]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
Schema = TypeVar("Schema", bound=BaseModel)

_FILE = {"type": "string", "format": "binary", "description": f"The rows: {', '.join(SUFFIXES)}; text files in UTF-8."}
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["name", "file"],
                    "additionalProperties": False,
                    "properties": {
                        "name": {"type": "string", "description": "A unique name.", "examples": ["veld-facts"]},
                        "file": _FILE,
                        "columns": {"type": "string", "description": "Column mapping as JSON (see DatasetIn.columns)."},
                        "duplicates": {"type": "string", "enum": ["error", "skip"], "default": "error"},
                    },
                }
            },
            "application/json": {"schema": {"$ref": "#/components/schemas/DatasetIn"}},
        },
    }
}


@router.post("", status_code=201, responses=problems(400, 409, 413, 415, 507), openapi_extra=BODY)
async def create_dataset(request: Request, services: Use, response: Response) -> DatasetOut:
    """Store training rows: an uploaded file, or one that lies on the server.

    On the server it may also be a folder that Hugging Face `datasets` saved (`save_to_disk`); of one with splits, name
    a split's folder.

    Alpaca (`instruction, input, output`), Dolly (`instruction, context, response`), prompt and response, chat
    `messages` and plain `text` are recognised; `columns` renames. A bad row refuses the whole file and is named by
    its line.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "multipart/form-data":
        dataset = await _upload(request, services)
    elif kind == "application/json":
        dataset = await _register(request, services)
    else:
        raise Refusal(
            415, "unsupported-media-type", "send multipart/form-data or application/json", field="Content-Type"
        )
    response.headers["Location"] = f"/datasets/{dataset.id}"
    return DatasetOut.of(dataset)


@router.get("")
async def list_datasets(
    catalog: Reading, services: Use, limit: Limit = 50, cursor: Cursor = None
) -> Listing[DatasetOut]:
    """Datasets, newest first."""
    page = await catalog.datasets.page(min(limit, services.settings.max_page), cursor)
    return Listing(items=[DatasetOut.of(dataset) for dataset in page.items], next_cursor=page.next_cursor)


@router.get("/{dataset}", responses=problems(404))
async def get_dataset(dataset: DatasetRef, catalog: Reading) -> DatasetOut:
    """One dataset."""
    return DatasetOut.of(await catalog.datasets.get(dataset))


@router.delete("/{dataset}", status_code=204, responses=problems(404, 409))
async def delete_dataset(dataset: DatasetRef, services: Use) -> None:
    """Delete a dataset with its samples; refused while an index uses it. A registered file stays where it lies."""
    async with services.work() as work:
        await work.catalog.datasets.remove(await work.catalog.datasets.get(dataset))


@router.get("/{dataset}/samples", responses=problems(404))
async def list_samples(
    dataset: DatasetRef,
    catalog: Reading,
    services: Use,
    limit: Limit = 50,
    cursor: PlaceCursor = None,
    filter: Annotated[str | None, Query(description=f"As JSON. {FILTER}", examples=[json.dumps(EXAMPLE)])] = None,
) -> Listing[SampleOut]:
    """The rows of a dataset in their order; with a filter, those whose metadata match."""
    conditions = parse_text(filter)
    if cursor is not None and not PLACE.fullmatch(cursor):
        raise Refusal(422, "bad-cursor", "this cursor is not one that the server gave", field="cursor")
    found = await catalog.datasets.get(dataset)
    after = -1 if cursor is None else int(cursor)
    page = await catalog.datasets.samples(found.id, min(limit, services.settings.max_page), after, conditions)
    items = [SampleOut.of(sample, json.loads(sample.record)) for sample in page.items]
    return Listing(items=items, next_cursor=page.next_cursor)


async def _register(request: Request, services: Services) -> Dataset:
    body = _valid(DatasetIn, await _json(request))
    path = paths.resolve(body.path, services.settings.roots, "path")
    if path.is_dir():
        files = await asyncio.to_thread(arrow_files, path)
    else:
        _require_suffix(path.name, "path")
        files = [path]
    if not all(file.is_file() for file in files):
        raise Refusal(422, "path-missing", f"{body.path!r} is not a file", field="path")
    if sum(file.stat().st_size for file in files) > services.settings.max_body_bytes:
        limit = services.settings.max_body_bytes
        raise Refusal(413, "too-large", f"a dataset's files may have at most {limit:,} bytes", field="path")
    async with services.database.catalog() as catalog:
        await catalog.datasets.require_free(body.name)
    return await _store(services, path, body, source=str(path))


async def _upload(request: Request, services: Services) -> Dataset:
    async with request.form(max_files=1, max_fields=8) as form:
        fields: dict[str, Any] = {name: value for name, value in form.items() if name != "file"}
        file = form.get("file")
        if "columns" in fields:
            fields["columns"] = _parse_columns(fields["columns"])
        body = _valid(DatasetUpload, fields)
        if not isinstance(file, UploadFile):
            raise Refusal(422, "invalid-request", "a file must be sent in the form field `file`", field="file")
        name = Path(file.filename or "").name
        _require_suffix(name, "file")
        async with services.database.catalog() as catalog:
            await catalog.datasets.require_free(body.name)
        copy = services.settings.uploads_dir / f"{new_id('upl')}{Path(name).suffix.lower()}"
        try:
            await asyncio.to_thread(_copy, file.file, copy)
            return await _store(services, copy, body, source=name)
        finally:
            await asyncio.to_thread(copy.unlink, missing_ok=True)


async def _store(services: Services, path: Path, body: DatasetIn | DatasetUpload, source: str) -> Dataset:
    columns = body.columns.model_dump(exclude_none=True) if body.columns else {}
    ingested: Ingested = await asyncio.to_thread(
        read_file, path, Columns(**columns) if columns else None, body.duplicates, services.settings.max_rows
    )
    dataset = ingested.dataset(body.name, source, columns)
    async with services.work() as work:
        await work.catalog.datasets.add(dataset, ingested.samples)
    return dataset


def _copy(source: BinaryIO, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        shutil.copyfileobj(source, file, 1024 * 1024)


def _require_suffix(name: str, field: str) -> None:
    if Path(name).suffix.lower() not in SUFFIXES:
        raise Refusal(422, "bad-file", f"{name!r}: the name must end in {', '.join(SUFFIXES)}", field=field)


def _parse_columns(value: object) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise Refusal(422, "invalid-request", f"columns is not JSON: {error}", field="columns") from error


async def _json(request: Request) -> Any:
    try:
        return await request.json()
    except ValueError as error:
        raise Refusal(422, "invalid-request", f"the body is not JSON: {error}", field="body") from error


def _valid(schema: type[Schema], value: Any) -> Schema:
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise RequestValidationError(
            [{**one, "loc": ("body", *one["loc"])} for one in error.errors(include_url=False, include_context=False)]
        ) from error
