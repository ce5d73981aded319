"""The services of tests/api, for a client that is the SDK."""

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from headwater_client import Client
from tests.api.conftest import asked_locked, quick
from tests.api.harness import Api, serving


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[Api]:
    """A service with the index `idx` over twelve rows; tests that make something choose names of their own."""
    folder = tmp_path_factory.mktemp("sdk")
    with serving(quick(folder, tiny_model_dir.parent)) as api:
        api.ready(tiny_model_dir)
        yield api


@pytest.fixture
def client(service: Api) -> Iterator[Client]:
    with Client(str(service.base_url)) as client:
        yield client


__all__ = ["asked_locked"]


class Scripted(httpx2.BaseTransport):
    """A service whose answers are written down; it keeps what it was sent."""

    def __init__(self, *answers: httpx2.Response | Exception) -> None:
        self.answers = list(answers)
        self.sent: list[httpx2.Request] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        self.sent.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def scripted(*answers: httpx2.Response | Exception, retries: int = 4) -> tuple[Client, Scripted]:
    """A client of it, and what it kept."""
    transport = Scripted(*answers)
    http = httpx2.Client(base_url="http://headwater", transport=transport)
    return Client(http=http, retries=retries), transport
