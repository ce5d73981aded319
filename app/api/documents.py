"""The OpenAPI document: stable operation ids, and problems instead of FastAPI's own validation error."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel

from app.api import examples
from app.api.guard import needed
from app.api.schemas.datasets import DatasetIn
from app.catalog.types import Scope
from app.problems import MEDIA_TYPE, Problem

REASONS = {
    401: "No API key, or one that is not known. Keys are not needed where the service listens on loopback alone.",
    403: "The API key lacks a scope, which `detail` names.",
    400: "The body cannot be parsed.",
    404: "There is no such thing.",
    409: "Its state, or a name that is taken, does not allow this. `index-corrupt`: a damaged shard; repair the index.",
    413: "Too large.",
    415: "Not a media type that is read here.",
    422: "The request is wrong; `errors` names the fields.",
    429: "The tenant's quota is spent; try again after `Retry-After` seconds.",
    503: "Too busy, or the database is away; try again after `Retry-After` seconds.",
    507: "The disk is full; nothing was kept.",
}
SCHEMES = {
    "bearer": {
        "type": "http",
        "scheme": "bearer",
        "description": "An API key, `hw_...`, made by `headwater keys create`. Its scopes say what it may do: `read`, "
        "`query` (ask /influence), `write` (which includes `read`), `admin` (all of it).",
    },
    "header": {"type": "apiKey", "in": "header", "name": "X-API-Key", "description": "The same key, sent this way."},
}
TAGS = [
    {"name": "influence", "description": "The main job: which training rows made the model say this?"},
    {
        "name": "models",
        "description": "A checkpoint with its adapters, registered once: loaded, checked, told module by module.",
    },
    {"name": "datasets", "description": "Training rows, uploaded or on the server, each with a stable id."},
    {
        "name": "indexes",
        "description": "A compressed gradient of each row of a dataset under a model; built once, by a job.",
    },
    {"name": "unlearning", "description": "Rows that a model is to forget: a job that makes an adapter and a report."},
    {
        "name": "valuation",
        "description": "What candidates are worth to train on: a job that makes scores and a report.",
    },
    {
        "name": "jobs",
        "description": "Whatever takes long: look, watch as events, cancel, run again, fetch what was made.",
    },
    {"name": "health", "description": "For whoever runs the service."},
]
"""The groups of operations, in the order in which somebody new meets them."""
UNUSED = ("HTTPValidationError", "ValidationError")


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of an operation that can refuse in these ways (422 is added to each)."""
    return {status: _problem(status) for status in statuses}


def _problem(status: int) -> dict[str, Any]:
    schema = {"$ref": "#/components/schemas/Problem"}
    return {"description": REASONS[status], "content": {MEDIA_TYPE: {"schema": schema}}}


def operation_id(route: APIRoute) -> str:
    """An operation is called what its function is called."""
    return route.name


def document(app: FastAPI) -> dict[str, Any]:
    """The document as served and as checked in."""
    if app.openapi_schema:
        return app.openapi_schema
    made = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    schemas = made["components"]["schemas"]
    for name in UNUSED:
        schemas.pop(name, None)
    for model in (Problem, DatasetIn):
        schemas.update(_schemas(model))
    made["components"]["schemas"] = dict(sorted(schemas.items()))
    for path, operations in made["paths"].items():
        for method, operation in operations.items():
            if "422" in operation["responses"] or method == "post":
                operation["responses"]["422"] = _problem(422)
            if operation["operationId"] != "is_alive":
                operation["responses"]["503"] = _problem(503)
            if "requestBody" in operation:
                operation["responses"]["400"] = _problem(400)
            _lock(operation, needed(method.upper(), path))
    made["components"]["securitySchemes"] = SCHEMES
    examples.add(made)
    app.openapi_schema = made
    return made


def _lock(operation: dict[str, Any], scope: Scope | None) -> None:
    """Say which scope an operation needs."""
    if scope is None:
        operation["security"] = []
        return
    operation["security"] = [{name: [scope.value]} for name in SCHEMES]
    operation["responses"] |= {str(status): _problem(status) for status in (401, 403, 429)}


def _schemas(model: type[BaseModel]) -> dict[str, Any]:
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    return {**schema.pop("$defs", {}), model.__name__: schema}
