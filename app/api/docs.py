"""Swagger UI, served from here: it works without a network, and no other site's script runs beside an API key."""

import base64
import hashlib
import re
from importlib.resources import files
from pathlib import Path

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, HTMLResponse

from app.problems import Refusal

PAGE = "/docs"
ASSETS = {name: f"{PAGE}/{name}" for name in ("swagger-ui-bundle.js", "swagger-ui.css", "favicon.png")}
FOLDER = Path(str(files("fastapi_offline"))) / "static"  # the package's copy of Swagger UI is all that is used of it
SCRIPT, STYLE, ICON = ASSETS.values()

router = APIRouter(include_in_schema=False)
html = bytes(
    get_swagger_ui_html(
        openapi_url="/openapi.json",
        title="Headwater",
        swagger_js_url=SCRIPT,
        swagger_css_url=STYLE,
        swagger_favicon_url=ICON,
    ).body
).decode()


def _policy() -> str:
    """The one script that stands in the page is allowed by its hash; Swagger UI sets styles as it goes."""
    scripts = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(("'self'", *(f"'sha256-{one}'" for one in hashes)))
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'self' 'unsafe-inline'; img-src 'self' data:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


@router.get(PAGE)
async def show_docs() -> HTMLResponse:
    """Swagger UI."""
    return HTMLResponse(html, headers={"Content-Security-Policy": _policy()})


@router.get(f"{PAGE}/{{name}}")
async def show_asset(name: str) -> FileResponse:
    """A file that the page loads."""
    if name not in ASSETS:
        raise Refusal(404, "not-found", f"there is no {name!r} here")
    return FileResponse(FOLDER / name)
