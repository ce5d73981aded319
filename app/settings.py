"""Every setting of the service, in one class.

Each field is read from the environment as ``HEADWATER_<NAME>`` (or from a ``.env`` file) and carries its own
explanation, so that this file is the reference. Moving from the embedded default (SQLite, in-process queue) to
PostgreSQL and Redis is a change of ``database_url`` and ``queue_url`` and of nothing else.
"""

import ipaddress
from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MEBIBYTE = 1024 * 1024
DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address. A name that is not `localhost` may lead anywhere."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost"
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


class Settings(BaseSettings):
    """How this process runs; immutable once read."""

    model_config = SettingsConfigDict(env_prefix="HEADWATER_", env_file=".env", extra="ignore", frozen=True)

    data_dir: Path = Field(
        Path("data"), description="Folder that holds the database, the indexes, what jobs make, and the uploads."
    )
    database_url: str = Field(
        "",
        repr=False,
        description="URL of the catalog: postgresql://user:password@host/name, migrated by `headwater migrate`; or "
        "sqlite:///file, migrated at start-up. Empty: SQLite in data_dir.",
    )
    database_pool_size: int = Field(10, ge=1, description="Connections to the database that are kept open.")
    database_pool_overflow: int = Field(10, ge=0, description="Connections beyond those, closed when they are done.")
    database_pool_timeout_s: float = Field(
        10.0, gt=0, description="How long a request waits for a connection to the database: 503 after that."
    )
    queue_url: str = Field(
        "memory://",
        repr=False,
        description="Where jobs queue: memory:// (this process) or redis://... (any number of workers).",
    )
    queue_name: str = Field("headwater", description="Prefix of the queue's keys, for services that share a Redis.")
    embedded_worker: bool = Field(True, description="Run a worker inside the API process.")
    host: str = Field("127.0.0.1", description="Address that the API listens on.")
    port: int = Field(8000, ge=0, le=65535, description="Port that the API listens on.")
    auth: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether requests need an API key (headwater keys). auto: unless the service listens on, and is "
        "reached at, a loopback address.",
    )
    metrics_open: bool = Field(False, description="Serve /metrics without a key, where keys are needed.")
    log_json: bool | None = Field(None, description="Logs as JSON lines. Unset: JSON unless stderr is a terminal.")
    log_level: str = Field("INFO", description="Least severe level that is logged.")
    otlp_endpoint: str = Field(
        "",
        description="Where traces go (OTLP over HTTP, http://collector:4318; needs the extra otel). "
        "Empty: OTEL_EXPORTER_OTLP_ENDPOINT; without either, nowhere.",
    )
    metrics_port: int = Field(
        0, ge=0, le=65535, description="Port of a worker process's /metrics. 0: none (the API has its own on port)."
    )
    shutdown_grace_s: float = Field(
        25.0, gt=0, description="After SIGTERM, how long requests in hand may take; what runs longer is cut off."
    )
    allowed_roots: tuple[Path, ...] = Field(
        (),
        description="Folders that paths in requests may lie in (JSON list). Empty: data_dir and the working directory.",
    )

    requests_per_minute: int = Field(
        0, ge=0, description="Requests a minute of a tenant's keys (headwater keys quota sets a tenant's own). 0: any."
    )
    tokens_per_minute: int = Field(
        0,
        ge=0,
        description="Tokens a minute of a tenant's influence queries: prompts, generations, and those that the model "
        "is to write. 0: any.",
    )

    threads: int = Field(0, ge=0, description="Threads that torch may use. 0: torch decides.")
    device: str = Field("cpu", description="Device of a model whose registration names none.")
    model_pool_size: int = Field(2, ge=1, description="Models kept loaded; the least recently used one makes room.")
    index_pool_size: int = Field(8, ge=1, description="Indexes kept open (mapped, so nearly free).")

    search_backend: Literal["local", "ray"] = Field(
        "local", description="Where shards are searched: mapped in this process, or held by actors of a Ray cluster."
    )
    build_backend: Literal["local", "ray"] = Field(
        "local", description="Where jobs work with models: in the worker's process, or on builders of a Ray cluster."
    )
    ray_builders: int = Field(
        1, ge=1, description="Builders that a worker has on the Ray cluster, and so the tasks that it does at once."
    )
    ray_gpus_per_builder: int = Field(
        0, ge=0, description="GPUs of one node that a builder reserves and spreads the model over. 0: as registered."
    )
    ray_cpus_per_builder: float = Field(1.0, ge=0, description="CPU cores that a builder reserves.")
    ray_address: str = Field("auto", description="Head of the Ray cluster. auto: the cluster of this machine.")
    ray_gpus_per_shard: float = Field(
        0.0, ge=0, description="Of a GPU the actor of a shard takes (0.25: four share one). 0: it stays on the CPU."
    )
    ray_patience_s: float = Field(
        60.0,
        gt=0,
        description="How long a query waits for shards that no node holds (503, which names them, after that), and "
        "a task for a builder.",
    )

    max_body_bytes: int = Field(256 * MEBIBYTE, ge=1, description="Largest request body, uploads included: 413 above.")
    max_rows: int = Field(500_000, ge=1, description="Most rows of one dataset: 413 above.")
    max_inline_rows: int = Field(1_000, ge=1, description="Most rows or ids written into one request: 422 above.")
    max_page: int = Field(500, ge=1, description="Largest page of a listing.")
    max_top_k: int = Field(1_000, ge=1, description="Largest top_k of an influence query.")
    max_token_rows: int = Field(
        50, ge=1, description="Largest top_k of an influence query with token scores: each sample costs a pass or more."
    )
    max_candidates: int = Field(1_000, ge=1, description="Most candidates that an influence query may have reranked.")
    max_ekfac_bytes: int = Field(
        4 * 1024 * MEBIBYTE,
        ge=1,
        description="Most bytes that the EK-FAC factors of a checkpoint may take, on disk and in memory while they are "
        "fitted: 422 above.",
    )
    max_query_chars: int = Field(100_000, ge=1, description="Most characters of prompt and generation together.")
    max_new_tokens: int = Field(512, ge=1, description="Most tokens that the model writes for a query.")
    max_length: int = Field(8_192, ge=1, description="Largest max_length (tokens a row) that an index may ask for.")

    batch_window_ms: float = Field(
        4.0, ge=0, description="How long an influence call waits for others to share a pass."
    )
    max_batch: int = Field(8, ge=1, description="Most influence calls in one forward and backward pass.")
    influence_queue: int = Field(64, ge=1, description="Influence calls that may wait; one more is answered 503.")
    max_batch_queries: int = Field(64, ge=1, description="Most queries of one POST /influence/batch.")

    lease_s: float = Field(
        30.0, gt=0, description="A worker that was not heard of for so long has lost its task to another."
    )
    task_timeout_s: float = Field(
        600.0, gt=0, description="A task that made no step for so long is taken from its worker."
    )
    task_retries: int = Field(
        3, ge=0, description="How often a task is done again after a lost worker or an unexpected error."
    )
    job_concurrency: int = Field(0, ge=0, description="Most tasks of one job that run at once. 0: no limit.")
    sweep_interval_s: float = Field(
        5.0, gt=0, description="How often lost tasks are looked for, and what the queue forgot is queued again."
    )
    catalog_patience_s: float = Field(
        300.0, ge=0, description="How long a worker waits for a catalog that is away before its task counts as failed."
    )
    reconcile_interval_s: float = Field(
        300.0,
        gt=0,
        description="How often a worker compares the catalog with the files; each process does at its start.",
    )
    progress_interval_s: float = Field(0.5, ge=0, description="A job's progress is written at most this often.")
    events_interval_s: float = Field(0.25, gt=0, description="How often a job's event stream looks for news.")
    idempotency_ttl_h: float = Field(24.0, gt=0, description="How long an Idempotency-Key and its answer are kept.")

    @field_validator("database_url")
    @classmethod
    def _with_driver(cls, url: str) -> str:
        """The URL with the driver that the code is written for, whichever way it names the database."""
        dialect, separator, rest = url.partition("://")
        if url and (dialect not in {*DRIVERS, *DRIVERS.values()} or not separator):
            raise ValueError("name a PostgreSQL (postgresql://user@host/name) or a SQLite file (sqlite:///file)")
        return f"{DRIVERS.get(dialect, dialect)}{separator}{rest}"

    @property
    def database_pool(self) -> dict[str, float]:
        """The connection pool, as SQLAlchemy wants it."""
        return {
            "pool_size": self.database_pool_size,
            "max_overflow": self.database_pool_overflow,
            "pool_timeout": self.database_pool_timeout_s,
        }

    @field_validator("embedded_worker")
    @classmethod
    def _somebody_works(cls, embedded: bool, info: ValidationInfo) -> bool:
        if not embedded and info.data.get("queue_url") == "memory://":
            raise ValueError("without an embedded worker nobody would do the jobs: set HEADWATER_QUEUE_URL=redis://...")
        return embedded

    @cached_property
    def catalog_url(self) -> str:
        """The database URL with its default filled in."""
        return self.database_url or f"sqlite+aiosqlite:///{self.data_dir.resolve() / 'headwater.db'}"

    @cached_property
    def roots(self) -> tuple[Path, ...]:
        """The allowed roots, resolved, so that a symbolic link cannot widen them."""
        return tuple(root.resolve() for root in self.allowed_roots or (self.data_dir, Path.cwd()))

    def needs_key(self, reached_at: str) -> bool:
        """Whether a request needs a key that reached us at this address of ours.

        The setting `host` alone would not do: another program than `headwater serve` may have bound the socket.
        """
        if self.auth == "auto":
            return not (is_loopback(self.host) and is_loopback(reached_at))
        return self.auth == "on"

    @property
    def indexes_dir(self) -> Path:
        """Where indexes live, one folder each."""
        return self.data_dir.resolve() / "indexes"

    @property
    def artifacts_dir(self) -> Path:
        """Where what jobs make lies, one folder each."""
        return self.data_dir.resolve() / "artifacts"

    @property
    def uploads_dir(self) -> Path:
        """Where an upload rests while its rows are read."""
        return self.data_dir.resolve() / "uploads"
