"""Artifacts: what a job made, file by file."""

import asyncio
from pathlib import PurePosixPath
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Path, Response
from fastapi.responses import FileResponse

from app.api.documents import problems
from app.api.jobs import existing_job
from app.api.schemas.artifacts import ArtifactOut
from app.api.schemas.common import Listing
from app.api.services import Use
from app.catalog.errors import NotFound
from app.jobs.artifacts import artifacts_of

router = APIRouter(prefix="/jobs", tags=["jobs"])
MEDIA_TYPES = {
    ".html": "text/html",
    ".json": "application/json",
    ".jsonl": "application/x-ndjson",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}
BINARY = "application/octet-stream"
SHOWN = {
    # a page may be looked at where it lies, as a document of nobody's that runs nothing and loads nothing
    "text/html": "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'none'",
}
KnownJob = Annotated[str, Depends(existing_job)]
ArtifactPath = Annotated[
    str, Path(description="An artifact's `path`, slashes included.", examples=["adapter/adapter_config.json"])
]
IfNoneMatch = Annotated[str | None, Header(description="ETags of what the caller has: 304 if one is still right.")]


@router.get("/{job}/artifacts", responses=problems(404))
async def list_artifacts(job_id: KnownJob, services: Use) -> Listing[ArtifactOut]:
    """The files that a job has made so far, by name; all of them at once."""
    found = await asyncio.to_thread(artifacts_of, services.settings.artifacts_dir / job_id)
    items = [
        ArtifactOut(path=one.path, bytes=one.size, media_type=_kind(one.path), modified_at=one.modified_at)
        for one in found
    ]
    return Listing(items=items, next_cursor=None)


@router.get(
    "/{job}/artifacts/{path:path}",
    response_class=Response,
    responses={
        200: {"content": {kind: {} for kind in (*MEDIA_TYPES.values(), BINARY)}, "description": "The file."},
        304: {"description": "What the caller has is still right."},
        **problems(404),
    },
)
async def get_artifact(
    job_id: KnownJob, path: ArtifactPath, services: Use, if_none_match: IfNoneMatch = None
) -> Response:
    """One file that a job made. It takes `Range`, and `If-None-Match` with the `ETag` of an earlier answer."""
    folder = services.settings.artifacts_dir / job_id
    found = await asyncio.to_thread(artifacts_of, folder)
    if path not in {one.path for one in found}:
        raise NotFound(f"job {job_id} has no artifact {path!r}", field="path")
    kind = _kind(path)
    headers = {"Content-Security-Policy": SHOWN[kind]} if kind in SHOWN else {}
    answer = FileResponse(
        folder / path,
        media_type=kind,
        headers=headers,
        filename=PurePosixPath(path).name,
        stat_result=await asyncio.to_thread((folder / path).stat),
        content_disposition_type="inline" if kind in SHOWN else "attachment",
    )
    if if_none_match and answer.headers["etag"] in (one.strip() for one in if_none_match.split(",")):
        return Response(status_code=304, headers={"ETag": answer.headers["etag"]})
    return answer


def _kind(path: str) -> str:
    return MEDIA_TYPES.get(PurePosixPath(path).suffix, BINARY)
