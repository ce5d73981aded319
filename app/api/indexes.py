"""Indexes: build (a job), inspect, add and remove rows, delete."""

import asyncio
import hashlib
import shutil
from dataclasses import asdict
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Path, Response

from app.api.documents import problems
from app.api.idempotency import IdempotentRoute
from app.api.ingest import read_inline
from app.api.schemas.common import Listing
from app.api.schemas.indexes import (
    EkfacAccepted,
    EkfacIn,
    IndexAccepted,
    IndexIn,
    IndexOut,
    IndexSummary,
    Removed,
    SamplesIn,
    SamplesRemoval,
)
from app.api.schemas.jobs import JobOut
from app.api.services import Cursor, Limit, Reading, Services, Use
from app.catalog.catalog import Catalog
from app.catalog.tables import INLINE, Dataset, IndexRow, Job
from app.catalog.types import JobKind, new_id
from app.influence.ekfac import factor_bytes, read_record
from app.influence.errors import FactorsCorrupt, SpecError
from app.influence.index import delete
from app.jobs.specs import index_from_json
from app.problems import Refusal

router = APIRouter(prefix="/indexes", tags=["indexes"], route_class=IdempotentRoute)
IndexRef = Annotated[str, Path(description="Id or name of an index.", examples=["facts"])]
NO_TEMPLATE = hashlib.sha256(b"").hexdigest()  # in a model's fingerprint: its tokenizer has no chat template


@router.post("", status_code=202, responses=problems(404, 409))
async def create_index(body: IndexIn, services: Use, response: Response) -> IndexAccepted:
    """Build an index over a dataset: a job, whose address is in `Location`.

    Each row's gradient is collected once, projected and stored; afterwards any number of generations can be asked.
    """
    if body.max_length > services.settings.max_length:
        detail = f"max_length may be at most {services.settings.max_length}"
        raise Refusal(422, "invalid-request", detail, field="max_length")
    spec = index_from_json(body.model_dump(include={"projection", "normalisation", "template", "max_length"}))
    async with services.work() as work:
        sources = await work.catalog.indexes.sources(body.name, body.model, body.dataset, body.heldout)
        model, dataset, heldout = sources
        if spec.template == "chat" and model.fingerprint.get("chat_template") == NO_TEMPLATE:
            detail = f"the tokenizer of model {model.name!r} has no chat template: choose alpaca or plain"
            raise SpecError(detail, field="template")
        index = IndexRow(
            id=new_id("idx"),
            name=body.name,
            model=model,
            dataset=dataset,
            dataset_id=dataset.id,
            heldout_id=heldout.id if heldout else None,
            spec={name: value for name, value in asdict(spec).items() if name in IndexIn.model_fields},
        )
        await work.catalog.indexes.add(index)
        job = await work.submit(Job(id=new_id("job"), kind=JobKind.BUILD_INDEX, index_id=index.id, params={}))
    return _accepted(index, job, response)


@router.get("")
async def list_indexes(
    catalog: Reading, services: Use, limit: Limit = 50, cursor: Cursor = None
) -> Listing[IndexSummary]:
    """Indexes, newest first."""
    page = await catalog.indexes.page(min(limit, services.settings.max_page), cursor)
    return Listing(items=[IndexSummary.of(index) for index in page.items], next_cursor=page.next_cursor)


@router.get("/{index}", responses=problems(404))
async def get_index(index: IndexRef, catalog: Reading, services: Use) -> IndexOut:
    """One index with its manifest."""
    found = await catalog.indexes.get(index)
    try:
        record = await asyncio.to_thread(read_record, services.settings.indexes_dir / found.id)
    except FactorsCorrupt:  # who wants to rerank is told; the index itself is whole
        record = None
    return IndexOut.of_index(found, record)


@router.delete("/{index}", status_code=204, responses=problems(404, 409))
async def delete_index(index: IndexRef, services: Use) -> None:
    """Delete an index and its files; refused while a job works on it."""
    async with services.work() as work:
        found = await work.catalog.indexes.get(index)
        await work.catalog.indexes.require_idle(found.id)
        await work.catalog.indexes.remove(found)
    path = services.settings.indexes_dir / found.id
    await asyncio.to_thread(shutil.rmtree, path, ignore_errors=True)
    services.compute.forget(path)


@router.post("/{index}/repair", status_code=202, responses=problems(404, 409))
async def repair_index(index: IndexRef, services: Use, response: Response) -> IndexAccepted:
    """Compute the damaged shards of an index anew, from the rows in the catalog: a job.

    Every shard is checked against its checksum; those that are as they were written stay. Rows that were added since
    the build stay, rows that were deleted stay away. Until it is done the index cannot be asked.
    """
    async with services.work() as work:
        found = await work.catalog.indexes.repairable(index)
        job = await work.submit(Job(id=new_id("job"), kind=JobKind.REPAIR_INDEX, index_id=found.id, params={}))
        await work.catalog.indexes.job_submitted(job)
        await work.catalog.refresh(found)
    return _accepted(found, job, response)


@router.post("/{index}/ekfac", status_code=202, responses=problems(404, 409))
async def fit_ekfac(index: IndexRef, services: Use, response: Response, body: EkfacIn | None = None) -> EkfacAccepted:
    """Fit EK-FAC factors over the rows of a ready index, for `"rerank": "ekfac"`: a job.

    Two passes over the rows for each checkpoint. Until it is done the index answers as before, with the factors of the
    last fit if there are any. A job that was killed or cancelled goes on from the sums that it kept.
    """
    body = body or EkfacIn()
    async with services.work() as work:
        found = await work.catalog.indexes.get(index)  # with the list of modules
        await work.catalog.indexes.ready(index)
        await work.catalog.indexes.require_idle(found.id)
        size = factor_bytes((module["d_out"], module["d_in"]) for module in found.model.attributed)
        _require_room(size, services)
        params = {"index": found.id, **body.model_dump()}
        job = await work.submit(Job(id=new_id("job"), kind=JobKind.FIT_EKFAC, index_id=found.id, params=params))
    accepted = _accepted(found, job, response)
    checkpoints = len(found.model.spec["checkpoints"]) or 1
    return EkfacAccepted(index=accepted.index, job=accepted.job, bytes=size * checkpoints, memory=2 * size)


@router.post("/{index}/samples", status_code=202, responses=problems(404, 409))
async def add_samples(index: IndexRef, body: SamplesIn, services: Use, response: Response) -> IndexAccepted:
    """Add rows to a ready index without rebuilding it: a job. Until it is done the index answers as before."""
    if (body.dataset is None) == (body.rows is None):
        raise Refusal(422, "invalid-request", "give either `dataset` or `rows`", field="dataset")
    async with services.work() as work:
        found = await work.catalog.indexes.ready(index)
        await work.catalog.indexes.require_idle(found.id)
        dataset = await _dataset_to_add(body, found, services, work.catalog)
        await work.catalog.indexes.link(found.id, dataset.id)
        params = {"dataset": dataset.id}
        job = await work.submit(Job(id=new_id("job"), kind=JobKind.APPEND_SAMPLES, index_id=found.id, params=params))
    return _accepted(found, job, response)


@router.delete("/{index}/samples", responses=problems(404, 409))
async def remove_samples(index: IndexRef, body: SamplesRemoval, services: Use) -> Removed:
    """Remove rows from an index by their stable ids, at once; ids that it does not hold are passed over."""
    _require_few(len(body.ids), services, "ids")
    async with services.work() as work:
        found = await work.catalog.indexes.ready(index)
        await work.catalog.indexes.require_idle(found.id)
        path = services.settings.indexes_dir / found.id
        async with services.noticing_damage(found.id):
            removed = await services.compute.run(partial(delete, path, body.ids))
            opened = await services.compute.index(path, found.version + 1, fresh=True)
        await work.catalog.indexes.published(found.id, opened.rows, opened.manifest.to_dict())
    return Removed(removed=removed, rows=opened.rows)


async def _dataset_to_add(body: SamplesIn, index: IndexRow, services: Services, catalog: Catalog) -> Dataset:
    if body.dataset is not None:
        return await catalog.datasets.get(body.dataset)
    rows = body.rows or []
    _require_few(len(rows), services, "rows")
    ingested = read_inline(rows, "error", services.settings.max_inline_rows)
    dataset = ingested.dataset(f"{index.name}+{new_id('rows')}", INLINE, {})
    await catalog.datasets.add(dataset, ingested.samples)
    return dataset


def _require_room(size: int, services: Services) -> None:
    most = services.settings.max_ekfac_bytes
    if size > most:
        detail = (
            f"the EK-FAC factors of this model take {size:,} bytes a checkpoint, and at most {most:,} are allowed: "
            'rerank by "exact", index an adapter of the model instead, or raise HEADWATER_MAX_EKFAC_BYTES'
        )
        raise Refusal(422, "invalid-request", detail, field="index")


def _require_few(count: int, services: Services, field: str) -> None:
    most = services.settings.max_inline_rows
    if count > most:
        raise Refusal(422, "invalid-request", f"one request may carry at most {most:,} {field}", field=field)


def _accepted(index: IndexRow, job: Job, response: Response) -> IndexAccepted:
    response.headers["Location"] = f"/jobs/{job.id}"
    response.headers["Retry-After"] = "1"
    return IndexAccepted(index=IndexSummary.of(index), job=JobOut.of(job))
