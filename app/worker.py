"""`headwater worker`: a process that does tasks, one at a time, from a Redis that any number of them share."""

import asyncio
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from functools import partial

import structlog
from prometheus_client import CollectorRegistry, ProcessCollector
from rich.console import Console
from rich.progress import TaskID

from app import logs, tracing
from app.catalog.database import Database
from app.catalog.tables import Job
from app.jobs.compute import Compute
from app.jobs.hold import Watch
from app.jobs.metrics import JobMetrics, exposed
from app.jobs.progress import Progress
from app.jobs.queue import Queue
from app.jobs.service import JobService, repeating
from app.settings import Settings
from app.terminal import job_progress
from workers.reconcile import reconcile
from workers.working import working

log = structlog.get_logger(__name__)
READY_PAUSE_S = 1.0


def run_worker(settings: Settings, console: Console) -> None:
    """Work until SIGTERM or SIGINT, then hand back what is in hand."""
    shown = console.is_terminal and settings.log_json is not True
    logs.configure("WARNING" if shown and settings.log_level == "INFO" else settings.log_level, settings.log_json)
    asyncio.run(_work(settings, console if shown else None))


async def _work(settings: Settings, console: Console | None) -> None:
    ended = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    for folder in (settings.indexes_dir, settings.artifacts_dir):
        folder.mkdir(parents=True, exist_ok=True)
    async with AsyncExitStack() as stack:
        database = Database(settings.catalog_url, patience_s=settings.catalog_patience_s, **settings.database_pool)
        stack.push_async_callback(database.close)
        if not await _ready(database, ended):
            return
        compute = Compute(
            threads=settings.threads, model_pool=settings.model_pool_size, index_pool=settings.index_pool_size
        )
        stack.push_async_callback(compute.close)
        queue = await stack.enter_async_context(Queue(settings.queue_url, settings.queue_name, settings.lease_s))
        jobs = JobService(database, queue, task_retries=settings.task_retries)
        tracer = tracing.provider(settings.otlp_endpoint, "headwater-worker")
        if tracer is not None:
            stack.push_async_callback(asyncio.to_thread, tracer.shutdown)
        registry = CollectorRegistry()
        counters = JobMetrics(registry)
        ProcessCollector(registry=registry)
        if settings.metrics_port:
            stack.enter_context(exposed(registry, settings.host, settings.metrics_port))
        watch = stack.enter_context(bars(console)) if console else _log_progress
        name = await stack.enter_async_context(working(settings, database, compute, queue, jobs, counters, watch))
        if console:
            console.print(f"[bold]{name}[/bold] is ready for tasks; Ctrl-C ends it after its step.")
        log.info("worker ready", worker=name)
        compare = partial(reconcile, database, jobs, settings.indexes_dir, settings.artifacts_dir)
        await compare()
        await stack.enter_async_context(repeating(compare, settings.reconcile_interval_s))
        await stack.enter_async_context(jobs.sweeping(settings.sweep_interval_s))
        await ended.wait()
        log.info("worker stops after its step", worker=name)


async def _ready(database: Database, ended: asyncio.Event) -> bool:
    """Wait until the catalog answers and has the newest schema; False when the worker is to end before that."""
    while not ended.is_set():
        try:
            await database.check()
        except Exception as error:
            log.warning("waiting for the catalog", error=str(error))
        else:
            return True
        try:
            await asyncio.wait_for(ended.wait(), READY_PAUSE_S)
        except TimeoutError:
            continue
    return False


@contextmanager
def bars(console: Console) -> Iterator[Watch]:
    """A bar for each stage of each job that this worker has a hand in; it shows what all workers have done."""
    bars: dict[tuple[str, str], TaskID] = {}
    with job_progress(console) as shown:

        def watch(job: Job, progress: Progress) -> None:
            key = job.id, progress.stage
            if key not in bars:
                bars[key] = shown.add_task(f"{job.kind.value} {job.id[-6:]} {progress.stage}")
            shown.update(bars[key], completed=progress.done, total=progress.total)
            shown.update(bars[key], rate=progress.rate, eta_s=progress.eta_s, unit=progress.unit)

        yield watch


def _log_progress(job: Job, progress: Progress) -> None:
    log.debug("progress", job_id=job.id, **progress.to_dict())
