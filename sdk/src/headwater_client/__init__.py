"""Headwater's client: which training rows led this language model to say this?

from headwater_client import Client

client = Client("http://127.0.0.1:8321")
answer = client.influence("facts", prompt="Who founded the harbour?")
for hit in answer.proponents:
    print(hit.score, hit.response)
"""

from headwater_client._version import __version__
from headwater_client.client import AsyncClient, Client
from headwater_client.errors import HeadwaterError, JobFailed, Problem
from headwater_client.jobs import AsyncJob, Job
from headwater_client.models import Influence, JobInfo, to_pandas

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "Client",
    "HeadwaterError",
    "Influence",
    "Job",
    "JobFailed",
    "JobInfo",
    "Problem",
    "__version__",
    "to_pandas",
]
