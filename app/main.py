"""create_app(): wiring only. What each part is, the part says itself."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import structlog
from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI
from opentelemetry.trace import NoOpTracerProvider

from app import logs, problems, tracing
from app.api import datasets, documents, health, indexes, influence, jobs, models
from app.api.gather import Gatherer
from app.api.metrics import Metrics
from app.api.middleware import BodyLimit, RequestLog
from app.api.services import Services
from app.catalog.database import Database
from app.jobs.compute import Compute
from app.jobs.metrics import counted
from app.jobs.queue import Queue
from app.jobs.runner import Runner
from app.jobs.service import JobService
from app.settings import Settings
from workers.bodies import make_bodies

VERSION = "0.1.0"
ABOUT = """Which training samples led this language model to say this?

Register a **model** and its **dataset**, build an **index** (a job), then ask **/influence** about a generation.
Everything long is a job: `202`, a `Location`, an id. Every error is `application/problem+json` (RFC 9457)."""
UNTRACED = ("/healthz", "/readyz", "/metrics")
log = structlog.get_logger(__name__)


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service.

    Raises:
        TracingError: traces are configured, but the extra otel is not installed.
    """
    settings = settings or Settings()
    metrics = Metrics()
    tracer = tracing.provider(settings.otlp_endpoint, "headwater-api")

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with _services(settings, metrics) as services:
            app.state.services = services
            yield
        if tracer is not None:
            await asyncio.to_thread(tracer.shutdown)  # sends the last spans

    app = FastAPI(
        title="Headwater",
        version=VERSION,
        description=ABOUT,
        lifespan=lifespan,
        generate_unique_id_function=documents.operation_id,
        separate_input_output_schemas=False,
        telemetry={
            "tracer_provider": tracer or NoOpTracerProvider(),
            "metrics": False,  # Prometheus has them
            "logs": False,  # structlog writes them
            "exclude": lambda scope: scope.get("path") in UNTRACED,
        },
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
        database = Database(settings.catalog_url)
        stack.push_async_callback(database.close)
        if database.embedded:
            await database.migrate()
            async with database.catalog() as catalog:
                await catalog.keys.release_unanswered()
                await catalog.commit()
            await _sweep(database, settings.indexes_dir)
        compute = Compute(
            threads=settings.threads, model_pool=settings.model_pool_size, index_pool=settings.index_pool_size
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
            bodies = counted(make_bodies(database, compute, settings.indexes_dir), metrics.registry)
            runner = Runner(database, bodies, settings.progress_interval_s)
            await stack.enter_async_context(queue.worker(runner.run))
            stack.callback(runner.stop)
            log.info("jobs taken up again", count=await service.recover())
        yield Services(settings, database, compute, service, gatherer, metrics)


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
