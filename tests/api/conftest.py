"""A running service for each test, and one with a built index that the tests which only read share."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from app.catalog.database import Database
from app.catalog.types import Scope
from app.settings import Settings
from tests.api.harness import Api, must, serving
from tests.conftest import BACKENDS, Backend, backend_for

Serve = Callable[..., Api]
Mint = Callable[..., str]


def quick(data_dir: Path, *roots: Path, **more: Any) -> Settings:
    """Settings for tests: everything in a temporary folder, short waits."""
    base: dict[str, Any] = {
        "data_dir": data_dir,
        "allowed_roots": (data_dir, *roots),
        "threads": 1,
        "events_interval_s": 0.02,
        "progress_interval_s": 0.02,
        "task_retries": 0,
        "log_level": "ERROR",
    }
    return Settings(**(base | more), _env_file=None)


@pytest.fixture
def serve(tmp_path: Path, tiny_model_dir: Path, backend: Backend) -> Iterator[Serve]:
    """Start a service with settings of the test's own; a second call is a restart on the same data."""
    with ExitStack() as stack:

        def start(**more: Any) -> Api:
            stack.pop_all().close()
            settings = quick(tmp_path, tiny_model_dir.parent, **(backend.settings | more))
            return stack.enter_context(serving(settings))

        yield start


@pytest.fixture
def api(serve: Serve) -> Api:
    """A fresh service."""
    return serve()


@pytest.fixture(scope="session", params=BACKENDS)
def asked(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> Iterator[Api]:
    """A service with the index `idx` over twelve rows, for tests that change nothing."""
    folder = tmp_path_factory.mktemp("asked")
    with (
        backend_for(request, folder) as backend,
        serving(quick(folder, tiny_model_dir.parent, **backend.settings)) as api,
    ):
        api.ready(tiny_model_dir)
        yield api


@pytest.fixture(scope="module", params=BACKENDS)
def refusing(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path
) -> Iterator[Api]:
    """An empty service, for tests of requests that it refuses; it is still empty after all of them."""
    folder = tmp_path_factory.mktemp("refusing")
    with (
        backend_for(request, folder) as backend,
        serving(quick(folder, tiny_model_dir.parent, **backend.settings)) as api,
    ):
        yield api
        for kind in ("datasets", "models", "indexes", "jobs"):
            assert must(api.get(f"/{kind}"))["items"] == []


@pytest.fixture(scope="session")
def asked_locked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """An empty service that needs keys, of which there are none."""
    with serving(quick(tmp_path_factory.mktemp("locked"), auth="on")) as api:
        yield api


@pytest.fixture
def locked(serve: Serve) -> Api:
    """A fresh service that needs keys."""
    return serve(auth="on")


@pytest.fixture
def mint(backend: Backend) -> Mint:
    """Make a key of a tenant with the given scopes; with quotas, the tenant gets those."""

    async def made(tenant: str, scopes: tuple[Scope, ...], quotas: tuple[int | None, int | None] | None) -> str:
        database = Database(backend.database_url)
        await database.migrate()
        async with database.catalog() as found:
            _, text = await found.api_keys.create(tenant, scopes, "")
            if quotas is not None:
                await found.api_keys.set_quota(tenant, *quotas)
            await found.commit()
        await database.close()
        return text

    def mint(tenant: str, *scopes: Scope, quotas: tuple[int | None, int | None] | None = None) -> str:
        return asyncio.run(made(tenant, scopes, quotas))

    return mint


def bearer(key: str) -> dict[str, str]:
    """The header that carries a key."""
    return {"Authorization": f"Bearer {key}"}
