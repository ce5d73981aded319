"""The page: a few static files, served from here, and a policy under which nothing else can be loaded or run.

It is a client like any other: all that it shows comes from the API, with the caller's key, and nothing is written into
the page by the server. So the files themselves are open to everybody.
"""

from importlib.resources import files
from pathlib import Path
from typing import Annotated

from fastapi import APIRouter, Header, Response
from fastapi.responses import FileResponse

from app.problems import Refusal

PAGE = "/"
FOLDER = Path(str(files("app"))) / "ui"
KINDS = {".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
ASSETS = {f"/ui/{file.name}": file for file in sorted(FOLDER.iterdir()) if file.suffix in KINDS}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
IfNoneMatch = Annotated[str | None, Header()]

router = APIRouter(include_in_schema=False)


@router.get(PAGE)
async def show_page(if_none_match: IfNoneMatch = None) -> Response:
    """The page."""
    return _file(FOLDER / "index.html", "text/html", if_none_match)


@router.get("/ui/{name}")
async def show_ui_asset(name: str, if_none_match: IfNoneMatch = None) -> Response:
    """A file that the page loads."""
    file = ASSETS.get(f"/ui/{name}")
    if file is None:
        raise Refusal(404, "not-found", f"there is no {name!r} here")
    return _file(file, KINDS[file.suffix], if_none_match)


def _file(file: Path, kind: str, if_none_match: str | None) -> Response:
    # kept by the browser, and asked for again each time: after an upgrade nobody runs half of the old page
    headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
    answer = FileResponse(file, media_type=kind, headers=headers, stat_result=file.stat())
    if if_none_match == answer.headers["etag"]:
        return Response(status_code=304, headers={"ETag": answer.headers["etag"], **headers})
    return answer
