"""The two clients. An operation is a line in each: its words and its signature are in `_operations.py`."""

import os
from typing import Any, Self

import httpx2

from headwater_client import _operations as operations
from headwater_client._core import AwaitingTransport, BlockingTransport, Core
from headwater_client._facade import Awaiting, AwaitingPages, AwaitingSubmission, Blocking, Paging, Submitting
from headwater_client._operations import Call
from headwater_client._version import __version__
from headwater_client.models import Index, JobInfo, Valuation

URL_VARIABLE, KEY_VARIABLE = "HEADWATER_URL", "HEADWATER_API_KEY"
DEFAULT_URL = "http://127.0.0.1:8000"
TIMEOUT_S = 600.0  # a large model writes and explains an answer in minutes
CONNECT_S = 10.0
RETRIES = 4
LONGEST_WAIT_S = 60.0


def _index(job: JobInfo) -> Call[Index]:
    return operations.get_index(job.index or "")


def _valuation(job: JobInfo) -> Call[Valuation]:
    return operations.get_valuation(job.id)


def _result(job: JobInfo) -> Call[dict[str, Any]]:
    return operations.get_result(job.id)


class _Part:
    def __init__(self, core: Core) -> None:
        self.core = core


class Models(_Part):
    """Registered models."""

    create = Blocking(operations.create_model)
    list = Paging(operations.list_models)
    get = Blocking(operations.get_model)
    delete = Blocking(operations.delete_model)


class AsyncModels(_Part):
    """Registered models."""

    create = Awaiting(operations.create_model)
    list = AwaitingPages(operations.list_models)
    get = Awaiting(operations.get_model)
    delete = Awaiting(operations.delete_model)


class Datasets(_Part):
    """Training rows."""

    create = Blocking(operations.create_dataset)
    upload = Blocking(operations.upload_dataset)
    list = Paging(operations.list_datasets)
    get = Blocking(operations.get_dataset)
    delete = Blocking(operations.delete_dataset)
    samples = Paging(operations.list_samples)


class AsyncDatasets(_Part):
    """Training rows."""

    create = Awaiting(operations.create_dataset)
    upload = Awaiting(operations.upload_dataset)
    list = AwaitingPages(operations.list_datasets)
    get = Awaiting(operations.get_dataset)
    delete = Awaiting(operations.delete_dataset)
    samples = AwaitingPages(operations.list_samples)


class Indexes(_Part):
    """Indexes of models over datasets."""

    build = Submitting(operations.create_index, _index)
    list = Paging(operations.list_indexes)
    get = Blocking(operations.get_index)
    delete = Blocking(operations.delete_index)
    repair = Submitting(operations.repair_index, _index)
    fit_ekfac = Submitting(operations.fit_ekfac, _index)
    add = Submitting(operations.add_samples, _index)
    remove = Blocking(operations.remove_samples)


class AsyncIndexes(_Part):
    """Indexes of models over datasets."""

    build = AwaitingSubmission(operations.create_index, _index)
    list = AwaitingPages(operations.list_indexes)
    get = Awaiting(operations.get_index)
    delete = Awaiting(operations.delete_index)
    repair = AwaitingSubmission(operations.repair_index, _index)
    fit_ekfac = AwaitingSubmission(operations.fit_ekfac, _index)
    add = AwaitingSubmission(operations.add_samples, _index)
    remove = Awaiting(operations.remove_samples)


class Valuations(_Part):
    """What rows are worth."""

    create = Submitting(operations.value_rows, _valuation)
    list = Paging(operations.list_valuations)
    get = Blocking(operations.get_valuation)
    scores = Paging(operations.list_scores)
    select = Blocking(operations.select_rows)


class AsyncValuations(_Part):
    """What rows are worth."""

    create = AwaitingSubmission(operations.value_rows, _valuation)
    list = AwaitingPages(operations.list_valuations)
    get = Awaiting(operations.get_valuation)
    scores = AwaitingPages(operations.list_scores)
    select = Awaiting(operations.select_rows)


class Jobs(_Part):
    """Long work. A job by its id is an object that can be waited for; a list has them as they were."""

    list = Paging(operations.list_jobs)
    get = Submitting(operations.get_job, _result)


class AsyncJobs(_Part):
    """Long work. A job by its id is an object that can be waited for; a list has them as they were."""

    list = AwaitingPages(operations.list_jobs)
    get = AwaitingSubmission(operations.get_job, _result)


class Client:
    """Headwater, over blocking calls.

    Args:
        url: of the service; left out: `HEADWATER_URL`, else http://127.0.0.1:8000.
        api_key: left out: `HEADWATER_API_KEY`, if that is set.
        timeout: seconds that an answer may take.
        retries: attempts after the first where the service does not answer, is busy (503) or the quota is spent (429).
        longest_wait: seconds; a `Retry-After` beyond it is raised instead of waited for.
        http: a client of httpx2 to use, with a base URL of its own: for proxies, certificates, tests.
    """

    influence = Blocking(operations.query_influence)
    influence_batch = Blocking(operations.query_influence_batch)
    influence_chat = Blocking(operations.query_chat_completion)
    unlearn = Submitting(operations.unlearn_rows, _result)
    preview_unlearn = Blocking(operations.preview_unlearn)
    is_alive = Blocking(operations.is_alive)
    is_ready = Blocking(operations.is_ready)
    metrics = Blocking(operations.read_metrics)

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = TIMEOUT_S,
        retries: int = RETRIES,
        longest_wait: float = LONGEST_WAIT_S,
        http: httpx2.Client | None = None,
    ) -> None:
        self._http = http or httpx2.Client(**_connection(url, api_key, timeout))
        self.core = core = Core(BlockingTransport(self._http), retries, longest_wait)
        self.models = Models(core)
        self.datasets = Datasets(core)
        self.indexes = Indexes(core)
        self.valuations = Valuations(core)
        self.jobs = Jobs(core)

    @property
    def url(self) -> str:
        """Where the service is."""
        return str(self._http.base_url)

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_raised: object) -> None:
        self.close()


class AsyncClient:
    """Headwater, over an event loop; everything as in `Client`."""

    influence = Awaiting(operations.query_influence)
    influence_batch = Awaiting(operations.query_influence_batch)
    influence_chat = Awaiting(operations.query_chat_completion)
    unlearn = AwaitingSubmission(operations.unlearn_rows, _result)
    preview_unlearn = Awaiting(operations.preview_unlearn)
    is_alive = Awaiting(operations.is_alive)
    is_ready = Awaiting(operations.is_ready)
    metrics = Awaiting(operations.read_metrics)

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = TIMEOUT_S,
        retries: int = RETRIES,
        longest_wait: float = LONGEST_WAIT_S,
        http: httpx2.AsyncClient | None = None,
    ) -> None:
        self._http = http or httpx2.AsyncClient(**_connection(url, api_key, timeout))
        self.core = core = Core(AwaitingTransport(self._http), retries, longest_wait)
        self.models = AsyncModels(core)
        self.datasets = AsyncDatasets(core)
        self.indexes = AsyncIndexes(core)
        self.valuations = AsyncValuations(core)
        self.jobs = AsyncJobs(core)

    @property
    def url(self) -> str:
        """Where the service is."""
        return str(self._http.base_url)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_raised: object) -> None:
        await self.close()


def _connection(url: str | None, api_key: str | None, timeout: float) -> dict[str, Any]:
    key = api_key or os.environ.get(KEY_VARIABLE)
    headers = {"User-Agent": f"headwater-client/{__version__}"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    return {
        "base_url": url or os.environ.get(URL_VARIABLE) or DEFAULT_URL,
        "headers": headers,
        "timeout": httpx2.Timeout(timeout, connect=CONNECT_S),
    }
