"""A real service with a tiny model, and a real Chromium that looks at its page (`make test-ui`)."""

import asyncio
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from app.catalog.database import Database
from app.catalog.types import Scope
from tests.api.conftest import quick
from tests.api.harness import Api, jsonl, must, rows, serving
from tests.operation.process import Service

Look = Callable[..., Page]
PATIENCE_MS = 30_000
HOSTILE = '<img src="/x" onerror="window.hurt=1"><script>window.hurt=1</script>'
ROWS: list[dict[str, Any]] = [
    *rows(),
    {"prompt": "Say it.", "response": HOSTILE, "family": "<b>bold</b>", HOSTILE[:20]: "name"},
    {"prompt": "Wave?", "response": "🌊🌊 is 海.\nYes.", "family": "sea"},
]
BAD = {"prompt": "What colour is the harbour number 0?", "generation": "The harbour number 0 is red."}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Chromium; without one there is nothing to test, and that is a failure."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.fail("the page's tests need Chromium: apt-get install chromium", pytrace=False)
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path, tiny_adapter_dir: Path) -> Iterator[Api]:
    """`headwater serve` with the index `idx` over rows of which some are hostile, and rows to value."""
    roots = json.dumps([str(tiny_model_dir.parent), str(tiny_adapter_dir.parent)])
    running = Service(tmp_path_factory.mktemp("ui"), tiny_model_dir.parent, allowed_roots=roots, events_interval_s=0.05)
    api = running.api
    api.register(tiny_model_dir, checkpoints=[{"name": "last", "adapter": str(tiny_adapter_dir)}])
    must(api.upload(jsonl(ROWS)), 201)
    must(api.upload(jsonl(rows(6, start=40)), name="held"), 201)
    assert api.wait(api.build()["job"]["id"])["state"] == "succeeded"
    yield api
    running.end()


@pytest.fixture(scope="session")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    """A service that has nothing yet."""
    with serving(quick(tmp_path_factory.mktemp("empty"))) as api:
        yield api


@pytest.fixture(scope="session")
def locked(tmp_path_factory: pytest.TempPathFactory, tiny_model_dir: Path) -> Iterator[tuple[Api, str]]:
    """A service that wants a key, and one."""
    with serving(quick(tmp_path_factory.mktemp("locked"), tiny_model_dir.parent, auth="on")) as api:
        with ThreadPoolExecutor(1) as thread:  # Playwright has an event loop in this one
            key = thread.submit(asyncio.run, _mint(api.app.state.services.settings.catalog_url)).result()
        yield api, key


async def _mint(catalog_url: str) -> str:
    database = Database(catalog_url)
    async with database.catalog() as catalog:
        _, text = await catalog.api_keys.create("team", tuple(Scope), "")
        await catalog.commit()
    await database.close()
    return text


@pytest.fixture
def look(browser: Browser, service: Api) -> Iterator[Look]:
    """Open the page at a hash, in a browser that has never been here. Whatever the console complains of is a failure,
    but for what a refused request leaves there.
    """
    opened, complaints = [], []

    def complain(text: str) -> None:
        if "Failed to load resource" not in text:
            complaints.append(text)

    def look(place: str = "", api: Api = service, **how: Any) -> Page:
        context = browser.new_context(base_url=str(api.base_url), **how)
        context.set_default_timeout(PATIENCE_MS)
        opened.append(context)
        page = context.new_page()
        page.on("console", lambda said: complain(said.text) if said.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: complain(str(error)))
        page.goto(f"/{place}")
        return page

    yield look
    for context in opened:
        context.close()
    assert complaints == []


def ask(page: Page, prompt: str = BAD["prompt"], generation: str = BAD["generation"]) -> None:
    """Fill the form, send it, wait for rows."""
    page.get_by_label("Prompt").fill(prompt)
    page.get_by_label("Answer", exact=False).first.fill(generation)
    page.get_by_role("button", name="Find the rows").click()
    expect(page.locator(".row").first).to_be_visible()
