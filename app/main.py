"""create_app(): wiring only. What each part is, the part says itself."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import structlog
from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI
from opentelemetry.trace import NoOpTracerProvider

from app import logs, problems, tracing
from app.api import (
    artifacts,
    datasets,
    docs,
    documents,
    health,
    indexes,
    influence,
    jobs,
    models,
    ui,
    unlearn,
    valuation,
    valuations,
)
from app.api.gather import Gatherer
from app.api.guard import Guard
from app.api.metrics import Metrics
from app.api.middleware import BodyLimit, RequestLog, SecurityHeaders
from app.api.quotas import Quotas
from app.api.services import Services
from app.catalog.database import Database
from app.influence.index import Searchable, open_index
from app.jobs.compute import Compute
from app.jobs.metrics import JobMetrics
from app.jobs.queue import Queue
from app.jobs.service import JobService
from app.settings import Settings, is_loopback
from workers.reconcile import reconcile
from workers.working import working

VERSION = "0.1.0"
log = structlog.get_logger(__name__)
UPLOAD_S = 3600.0  # longer than any upload takes
ABOUT = """Which training samples led this language model to say this?

Register a **model** and its **dataset**, build an **index** (a job), then ask **/influence** about a generation: each
operation below has examples to start from. Everything long is a job: `202`, a `Location`, an id. Every error is
`application/problem+json` (RFC 9457)."""
UNTRACED = ("/healthz", "/readyz", "/metrics")


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
        openapi_tags=documents.TAGS,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=documents.operation_id,
        separate_input_output_schemas=False,
        telemetry={
            "tracer_provider": tracer or NoOpTracerProvider(),
            "metrics": False,  # Prometheus has them
            "logs": False,  # structlog writes them
            "exclude": lambda scope: scope.get("path") in UNTRACED,
        },
    )
    for resource in (
        influence,
        models,
        datasets,
        indexes,
        unlearn,
        valuation,
        valuations,
        jobs,
        artifacts,
        health,
        docs,
        ui,
    ):
        app.include_router(resource.router)
    problems.install(app)
    app.add_middleware(BodyLimit, limit=settings.max_body_bytes)
    app.add_middleware(Guard, settings=settings, services=lambda: app.state.services)
    app.add_middleware(RequestLog, metrics=metrics)
    app.add_middleware(SecurityHeaders)
    app.add_middleware(CorrelationIdMiddleware, validator=_is_request_id)
    app.openapi = lambda: documents.document(app)  # type: ignore[method-assign]
    return app


def _is_request_id(given: str) -> bool:
    """Short, printable, and not an API key in the wrong header: an id is logged, kept and sent back."""
    return 0 < len(given) <= 200 and given.isprintable() and logs.masked(given) == given


@asynccontextmanager
async def _services(settings: Settings, metrics: Metrics) -> AsyncIterator[Services]:
    """Everything that lives as long as the process, ended in the opposite order."""
    logs.configure(settings.log_level, settings.log_json)
    for folder in (settings.data_dir, settings.indexes_dir, settings.artifacts_dir, settings.uploads_dir):
        folder.mkdir(parents=True, exist_ok=True)
    await asyncio.to_thread(_remove_half_uploads, settings.uploads_dir)
    async with AsyncExitStack() as stack:
        database = Database(settings.catalog_url, patience_s=settings.catalog_patience_s, **settings.database_pool)
        stack.push_async_callback(database.close)
        if database.embedded:
            await database.migrate()
            async with database.catalog() as catalog:
                await catalog.keys.release_unanswered()
                await catalog.commit()
        else:
            await database.check()
        if settings.needs_key(settings.host):
            async with database.catalog() as catalog:
                if not any(key.revoked_at is None for key in await catalog.api_keys.all()):
                    log.warning("requests need an API key and there is none: make one with `headwater keys create`")
        elif not is_loopback(settings.host):
            log.warning("anybody who reaches this service may use all of it: HEADWATER_AUTH is off", host=settings.host)
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
        queue = await stack.enter_async_context(Queue(settings.queue_url, settings.queue_name, settings.lease_s))
        service = JobService(database, queue, task_retries=settings.task_retries)
        await reconcile(database, service, settings.indexes_dir, settings.artifacts_dir)
        if settings.embedded_worker:
            counters = JobMetrics(metrics.registry)
            await stack.enter_async_context(working(settings, database, compute, queue, service, counters))
        await stack.enter_async_context(service.sweeping(settings.sweep_interval_s))
        quotas = Quotas(settings.queue_url, metrics)
        stack.push_async_callback(quotas.close)
        yield Services(settings, database, compute, service, gatherer, metrics, quotas)


def _remove_half_uploads(folder: Path) -> None:
    """What a killed process left, but not what another API process receives into the shared folder at this moment."""
    for upload in folder.iterdir():
        if time.time() - upload.stat().st_mtime > UPLOAD_S:
            upload.unlink(missing_ok=True)


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
