"""Health and metrics."""

import structlog
from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, Field

from app.api.documents import problems
from app.api.services import Use
from app.catalog.errors import CatalogError
from app.problems import Refusal

router = APIRouter(tags=["health"])
log = structlog.get_logger(__name__)


class Health(BaseModel):
    """A sign of life."""

    status: str = Field(description="Always `ok`; anything else is not a 200.", examples=["ok"])


@router.get("/healthz")
async def is_alive() -> Health:
    """The process answers: restart it when this fails."""
    return Health(status="ok")


@router.get("/readyz", responses=problems(503))
async def is_ready(services: Use) -> Health:
    """The database answers and has the newest schema: send requests only while this succeeds."""
    try:
        await services.database.check()
    except CatalogError as error:
        raise Refusal(503, "not-ready", error.detail, headers={"Retry-After": "5"}) from error
    return Health(status="ok")


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def read_metrics(services: Use) -> Response:
    """Prometheus' text format. It answers without the catalog too, and says so: that is when it is needed."""
    metrics = services.metrics
    try:
        async with services.database.catalog() as catalog:
            await metrics.read(catalog)
        metrics.catalog_up.set(1)
    except Exception:
        log.exception("the catalog did not answer a scrape")
        metrics.catalog_up.set(0)
    return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)
