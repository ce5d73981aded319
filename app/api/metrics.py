"""What Prometheus scrapes. A registry of its own for each app, so that tests can run several in one process."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SECONDS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    """The counters of one app."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
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
        self.jobs = Gauge("headwater_jobs", "Jobs by state.", ["state"], registry=self.registry)
