"""What Prometheus scrapes of an API process: requests, the influence queue and its stages, and what the catalog holds.

A registry of its own for each app, so that tests can run several in one process. What the catalog holds (jobs, index
sizes) is read at the scrape and is the same from every API process: take the maximum over them, not the sum.
"""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from app.catalog.catalog import Catalog
from app.catalog.types import JobKind, JobState, now

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
STAGE_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = Counter(
            "headwater_http_requests", "HTTP requests.", ["method", "route", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "headwater_http_request_seconds", "Time to answer.", ["route"], buckets=SECONDS, registry=self.registry
        )
        self.batch_size = Histogram(
            "headwater_influence_batch", "Influence calls in a pass.", buckets=BATCHES, registry=self.registry
        )
        self.waiting = Gauge("headwater_influence_waiting", "Influence calls that wait.", registry=self.registry)
        self.dropped = Counter(
            "headwater_influence_dropped", "Influence calls whose client hung up.", registry=self.registry
        )
        self.refused = Counter(
            "headwater_influence_refused", "Influence calls refused as the queue was full.", registry=self.registry
        )
        self.pass_seconds = Histogram(
            "headwater_influence_pass_seconds", "Time of a shared pass.", buckets=SECONDS, registry=self.registry
        )
        self.quota_refused = Counter(
            "headwater_quota_refused", "What a tenant's quota refused.", ["kind"], registry=self.registry
        )
        self.quota_unchecked = Counter(
            "headwater_quota_unchecked", "What went uncounted, as Redis was away.", registry=self.registry
        )
        self.stage_seconds = Histogram(
            "headwater_influence_stage_seconds",
            "Time of an influence call by stage; gradients and search are those of the pass that it shared.",
            ["stage"],
            buckets=STAGE_SECONDS,
            registry=self.registry,
        )
        self.catalog_up = Gauge(
            "headwater_catalog_up", "1 if the catalog answered this scrape, else 0.", registry=self.registry
        )
        self.jobs = Gauge("headwater_jobs", "Jobs by kind and state.", ["kind", "state"], registry=self.registry)
        self.queue_depth = Gauge("headwater_queue_depth", "Jobs that no worker has taken.", registry=self.registry)
        self.queue_age = Gauge(
            "headwater_queue_oldest_seconds", "How long the oldest of them has waited.", registry=self.registry
        )
        self.index_rows = Gauge("headwater_index_rows", "Rows of an index.", ["index"], registry=self.registry)
        self.index_bytes = Gauge(
            "headwater_index_bytes", "Bytes of an index's shards on disk.", ["index"], registry=self.registry
        )
        self._sizes: dict[tuple[str, int], int] = {}  # bytes of an index at a version, so that a manifest is read once

    def note_stages(self, timings: Mapping[str, float]) -> None:
        """Count an influence call's stages; their names are the answer's `timings`."""
        for stage, seconds in timings.items():
            self.stage_seconds.labels(stage).observe(seconds)

    async def read(self, catalog: Catalog) -> None:
        """Set the gauges of what the catalog holds."""
        counts = await catalog.jobs.counts()
        for kind in JobKind:
            for state in JobState:
                self.jobs.labels(kind.value, state.value).set(counts.get((kind, state), 0))
        self.queue_depth.set(sum(count for (_, state), count in counts.items() if state is JobState.QUEUED))
        oldest = await catalog.jobs.oldest_queued()
        self.queue_age.set((now() - oldest).total_seconds() if oldest else 0)
        await self._read_sizes(catalog)

    async def _read_sizes(self, catalog: Catalog) -> None:
        published = await catalog.indexes.published_versions()
        known = {(one.id, one.version): self._sizes.get((one.id, one.version)) for one in published}
        for (index_id, version), size in known.items():
            if size is None:
                known[index_id, version] = await catalog.indexes.shard_bytes(index_id)
        self._sizes = {key: size or 0 for key, size in known.items()}
        self.index_rows.clear()
        self.index_bytes.clear()
        for one in published:
            self.index_rows.labels(one.name).set(one.rows)
            self.index_bytes.labels(one.name).set(self._sizes[one.id, one.version])
