"""create_app(): wiring only. What each part is, the part says itself."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import structlog
from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI

from app import logs, problems
from app.api import datasets, documents, health, indexes, influence, jobs, models
from app.api.gather import Gatherer
from app.api.metrics import Metrics
from app.api.middleware import BodyLimit, RequestLog
from app.api.services import Services
from app.catalog.database import Database
from app.influence.index import Searchable, open_index
from app.jobs.compute import Compute
from app.jobs.queue import Queue
from app.jobs.runner import Runner
from app.jobs.service import JobService
from app.settings import Settings
from workers.bodies import make_bodies

VERSION = "0.1.0"
ABOUT = """Which training samples led this language model to say this?

Register a **model** and its **dataset**, build an **index** (a job), then ask **/influence** about a generation.
Everything long is a job: `202`, a `Location`, an id. Every error is `application/problem+json` (RFC 9457)."""
log = structlog.get_logger(__name__)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service."""
    settings = settings or Settings()
    metrics = Metrics()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _services(settings, metrics) as services:
            app.state.services = services
            yield

    app = FastAPI(
        title="Headwater",
        version=VERSION,
        description=ABOUT,
        lifespan=lifespan,
        generate_unique_id_function=documents.operation_id,
        separate_input_output_schemas=False,
    )
    for resource in (influence, models, datasets, indexes, jobs, health):
        app.include_router(resource.router)
    problems.install(app)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(RequestLog, metrics=metrics)
    app.add_middleware(CorrelationIdMiddleware, validator=lambda given: 0 < len(given) <= 200 and given.isprintable())
    app.openapi = lambda: documents.document(app)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _services(settings: Settings, metrics: Metrics) -> AsyncIterator[Services]:
    """Everything that lives as long as the process, ended in the opposite order."""
    logs.configure(settings.log_level, settings.log_json)
    shutil.rmtree(settings.uploads_dir, ignore_errors=True)  # half uploads of a process that was killed
    for folder in (settings.data_dir, settings.indexes_dir, settings.uploads_dir):
        folder.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        database = Database(settings.catalog_url, **settings.database_pool)
        stack.push_async_callback(database.close)
        if database.embedded:
            await database.migrate()
            async with database.catalog() as catalog:
                await catalog.keys.release_unanswered()
                await catalog.commit()
        else:
            await database.check()
        await _sweep(database, settings.indexes_dir)
        compute = Compute(
            threads=settings.threads,
            model_pool=settings.model_pool_size,
            index_pool=settings.index_pool_size,
            open_at=await asyncio.to_thread(_opener, settings),
        )
        stack.push_async_callback(compute.close)
        gatherer = Gatherer(
            compute,
            metrics,
            window_s=settings.batch_window_ms / 1000,
            max_batch=settings.max_batch,
            length=settings.influence_queue,
        )
        stack.push_async_callback(gatherer.close)
        queue = await stack.enter_async_context(Queue(settings.queue_url))
        service = JobService(database, queue)
        if settings.embedded_worker:
            runner = Runner(
                database, make_bodies(database, compute, settings.indexes_dir), settings.progress_interval_s
            )
            await stack.enter_async_context(queue.worker(runner.run))
            stack.callback(runner.stop)
            log.info("jobs taken up again", count=await service.recover())
        yield Services(settings, database, compute, service, gatherer, metrics)


def _opener(settings: Settings) -> Callable[[Path, bool], Searchable]:
    """How an index is opened for searches, by the setting."""
    if settings.search_backend == "local":
        return open_index
    from app.influence.sharded import Cluster  # here, since it needs the extra

    cluster = Cluster(
        settings.ray_address, settings.ray_gpus_per_shard, settings.ray_patience_s, threads=settings.threads
    )
    cluster.connect()
    return cluster.open


async def _sweep(database: Database, indexes_dir: Path) -> None:
    """Remove what a crash in the middle of a deletion left: folders of indexes that the catalog does not know.

    A catalog without a model has made none of them: then this is the wrong database, and nothing is touched.
    """
    folders = await asyncio.to_thread(lambda: list(indexes_dir.glob("idx_*")))  # first: a new index may come between
    async with database.catalog() as catalog:
        known, models = await catalog.indexes.ids(), await catalog.models.page(1, None)
    for folder in folders:
        if folder.name in known:
            continue
        if not models.items:
            log.warning("a folder of an index that this catalog does not know is left alone", folder=str(folder))
            continue
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)
        log.info("removed the folder of an index that is no more", folder=str(folder))
