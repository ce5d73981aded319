"""Models: register a checkpoint with its adapters, see what is attributed."""

from typing import Annotated

from fastapi import APIRouter, Path, Response

from app.api import paths
from app.api.documents import problems
from app.api.idempotency import IdempotentRoute
from app.api.schemas.common import Listing
from app.api.schemas.models import ModelIn, ModelOut, ModelSummary
from app.api.services import Cursor, Limit, Reading, Services, Use
from app.influence.models import Checkpoint, ModelSpec
from app.jobs.specs import model_from_json, model_row

router = APIRouter(prefix="/models", tags=["models"], route_class=IdempotentRoute)
ModelRef = Annotated[str, Path(description="Id or name of a model.", examples=["smollm2-veld"])]


@router.post("", status_code=201, responses=problems(409, 413))
async def create_model(body: ModelIn, services: Use, response: Response) -> ModelOut:
    """Register a checkpoint and its adapters.

    The model is loaded and checked once, off the event loop: safetensors only, finite weights, adapters that fit. The
    answer says which modules are attributed and which are left out, and why.
    """
    async with services.database.catalog() as catalog:
        await catalog.models.require_free(body.name)
    spec = _spec(body, services)
    loaded = await services.compute.model(spec, fresh=True)  # the files may have changed since they were loaded
    model = model_row(body.name, spec, loaded)
    async with services.work() as work:
        await work.catalog.models.add(model)
    response.headers["Location"] = f"/models/{model.id}"
    return ModelOut.of(model)


@router.get("")
async def list_models(
    catalog: Reading, services: Use, limit: Limit = 50, cursor: Cursor = None
) -> Listing[ModelSummary]:
    """Registered models, newest first."""
    page = await catalog.models.page(min(limit, services.settings.max_page), cursor)
    return Listing(items=[ModelSummary.of(model) for model in page.items], next_cursor=page.next_cursor)


@router.get("/{model}", responses=problems(404))
async def get_model(model: ModelRef, catalog: Reading) -> ModelOut:
    """One model with its fingerprint and its modules."""
    return ModelOut.of(await catalog.models.get(model))


@router.delete("/{model}", status_code=204, responses=problems(404, 409))
async def delete_model(model: ModelRef, services: Use) -> None:
    """Forget a registered model; refused while an index uses it. Its files stay where they are."""
    async with services.work() as work:
        found = await work.catalog.models.get(model)
        await work.catalog.models.remove(found)
    services.compute.forget_model(model_from_json(found.spec))


def _spec(body: ModelIn, services: Services) -> ModelSpec:
    roots = services.settings.roots
    checkpoints = tuple(
        Checkpoint(
            name=one.name,
            adapter=paths.resolve(one.adapter, roots, f"checkpoints.{place}.adapter") if one.adapter else None,
            model=paths.resolve(one.model, roots, f"checkpoints.{place}.model") if one.model else None,
            weight=one.weight,
        )
        for place, one in enumerate(body.checkpoints)
    )
    path = paths.resolve(body.path, roots, "path")
    if body.gguf_file is not None:
        paths.resolve(str(path / body.gguf_file), roots, "gguf_file")
    return ModelSpec(
        path=path,
        gguf_file=body.gguf_file,
        checkpoints=checkpoints,
        dtype=body.dtype,
        device=body.device or services.settings.device,
    )
