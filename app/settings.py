"""Every setting of the service, in one class.

Each field is read from the environment as ``HEADWATER_<NAME>`` (or from a ``.env`` file) and carries its own
explanation, so that this file is the reference. Moving from the embedded default (SQLite, in-process queue) to
PostgreSQL and Redis is a change of ``database_url`` and ``queue_url`` and of nothing else.
"""

from functools import cached_property
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MEBIBYTE = 1024 * 1024
DRIVERS = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+psycopg", "postgres": "postgresql+psycopg"}


class Settings(BaseSettings):
    """How this process runs; immutable once read."""

    model_config = SettingsConfigDict(env_prefix="HEADWATER_", env_file=".env", extra="ignore", frozen=True)

    data_dir: Path = Field(Path("data"), description="Folder that holds the database, the indexes and the uploads.")
    database_url: str = Field(
        "",
        description="URL of the catalog: postgresql://user:password@host/name, migrated by `headwater migrate`; or "
        "sqlite:///file, migrated at start-up. Empty: SQLite in data_dir.",
    )
    database_pool_size: int = Field(10, ge=1, description="Connections to the database that are kept open.")
    database_pool_overflow: int = Field(10, ge=0, description="Connections beyond those, closed when they are done.")
    database_pool_timeout_s: float = Field(
        10.0, gt=0, description="How long a request waits for a connection to the database: 503 after that."
    )
    queue_url: str = Field(
        "memory://", description="Where jobs queue: memory:// (this process) or redis://... (any number of workers)."
    )
    embedded_worker: bool = Field(True, description="Run a worker inside the API process.")
    host: str = Field("127.0.0.1", description="Address that the API listens on.")
    port: int = Field(8000, ge=0, le=65535, description="Port that the API listens on.")
    log_json: bool | None = Field(None, description="Logs as JSON lines. Unset: JSON unless stderr is a terminal.")
    log_level: str = Field("INFO", description="Least severe level that is logged.")
    allowed_roots: tuple[Path, ...] = Field(
        (),
        description="Folders that paths in requests may lie in (JSON list). Empty: data_dir and the working directory.",
    )

    threads: int = Field(0, ge=0, description="Threads that torch may use. 0: torch decides.")
    device: str = Field("cpu", description="Device of a model whose registration names none.")
    model_pool_size: int = Field(2, ge=1, description="Models kept loaded; the least recently used one makes room.")
    index_pool_size: int = Field(8, ge=1, description="Indexes kept open (mapped, so nearly free).")

    search_backend: Literal["local", "ray"] = Field(
        "local", description="Where shards are searched: mapped in this process, or held by actors of a Ray cluster."
    )
    ray_address: str = Field("auto", description="Head of the Ray cluster. auto: the cluster of this machine.")
    ray_gpus_per_shard: float = Field(
        0.0, ge=0, description="Of a GPU the actor of a shard takes (0.25: four share one). 0: it stays on the CPU."
    )
    ray_patience_s: float = Field(
        60.0,
        gt=0,
        description="How long a query waits for shards that no node holds: 503, which names them, after that.",
    )

    max_body_bytes: int = Field(256 * MEBIBYTE, ge=1, description="Largest request body, uploads included: 413 above.")
    max_rows: int = Field(500_000, ge=1, description="Most rows of one dataset: 413 above.")
    max_inline_rows: int = Field(1_000, ge=1, description="Most rows or ids written into one request: 422 above.")
    max_page: int = Field(500, ge=1, description="Largest page of a listing.")
    max_top_k: int = Field(1_000, ge=1, description="Largest top_k of an influence query.")
    max_token_rows: int = Field(
        50, ge=1, description="Largest top_k of an influence query with token scores: each sample costs a pass or more."
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

    @cached_property
    def catalog_url(self) -> str:
        """The database URL with its default filled in."""
        return self.database_url or f"sqlite+aiosqlite:///{self.data_dir.resolve() / 'headwater.db'}"

    @cached_property
    def roots(self) -> tuple[Path, ...]:
        """The allowed roots, resolved, so that a symbolic link cannot widen them."""
        return tuple(root.resolve() for root in self.allowed_roots or (self.data_dir, Path.cwd()))

    @property
    def indexes_dir(self) -> Path:
        """Where indexes live, one folder each."""
        return self.data_dir.resolve() / "indexes"

    @property
    def uploads_dir(self) -> Path:
        """Where an upload rests while its rows are read."""
        return self.data_dir.resolve() / "uploads"
