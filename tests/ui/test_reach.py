"""Whoever comes can read it: with a key, in the light and in the dark, on a phone, without a mouse, without eyes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import pytest
from playwright.sync_api import Page, expect

from tests.api.harness import Api, must
from tests.ui.conftest import BAD, Look

VIEWS = {
    "ask": f"#/ask?{urlencode({'index': 'idx', **BAD, 'span': '24,27'})}",
    "jobs": "#/jobs",
    "job": "#/jobs/{job}",
    "library": "#/library",
    "valuations": "#/valuations",
}
SETTLED = {"ask": ".row", "jobs": "tbody tr", "job": ".pill", "library": "tbody tr", "valuations": "details"}

AUDIT = Path(__file__).with_name("audit.js").read_text(encoding="utf-8")
"""`nameless()` and `pale()`: what they find wrong with the page as it stands."""


def faults(page: Page, kind: str) -> list[str]:
    return list(page.evaluate(f"({AUDIT}).{kind}()"))


@pytest.fixture
def visit(look: Look, service: Api) -> Callable[..., Page]:
    """Open a view and wait until it stands, with everything unfolded."""
    job = must(service.get("/jobs"))["items"][-1]["id"]

    def visit(view: str, **how: Any) -> Page:
        page = look(VIEWS[view].format(job=job), **how)
        expect(page.locator(SETTLED[view]).first).to_be_visible()
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        return page

    return visit


@pytest.mark.parametrize("view", VIEWS)
def test_everything_has_a_name_and_contrast_in_light_and_dark_and_fits_a_phone(
    visit: Callable[..., Page], view: str
) -> None:
    page = visit(view)
    assert faults(page, "nameless") == []
    assert faults(page, "pale") == []
    page.emulate_media(color_scheme="dark")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == "rgb(15, 19, 24)"
    assert faults(page, "pale") == []
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_dialogs_have_names_and_contrast_and_keep_the_focus(visit: Callable[..., Page]) -> None:
    page = visit("ask", color_scheme="dark")
    page.locator(".row").first.get_by_role("checkbox").check()
    page.get_by_role("button", name="Make the model forget them…").click()
    dialog = page.get_by_role("dialog", name="Forget 1 row")
    expect(dialog.get_by_label("Name of the new model")).to_have_value("tiny-clean-2")
    dialog.get_by_role("button", name="Preview").click()
    expect(dialog.get_by_text("What would be done")).to_be_visible()
    assert faults(page, "nameless") == []
    assert faults(page, "pale") == []
    for _ in range(25):
        page.keyboard.press("Tab")
        assert page.evaluate(
            "document.activeElement === document.body || document.activeElement.closest('dialog') !== null"
        )


def test_it_loads_nothing_from_anywhere_else_and_little_from_here(look: Look, service: Api) -> None:
    page = look("#/library")
    expect(page.locator("tbody tr").first).to_be_visible()
    loaded = page.evaluate("performance.getEntriesByType('resource').map((one) => [one.name, one.encodedBodySize])")
    assert {urlsplit(name).netloc for name, _ in loaded} == {urlsplit(str(service.base_url)).netloc}
    assert sum(size for name, size in loaded if "/ui/" in name) < 130_000


def test_a_service_that_wants_a_key_gets_it_with_everything_and_no_longer_than_the_tab_lives(
    look: Look, locked: tuple[Api, str]
) -> None:
    api, key = locked
    page = look("#/library", api)
    dialog = page.get_by_role("dialog", name="This service wants an API key")
    dialog.get_by_label("API key").fill("hw_wrong")
    dialog.get_by_role("button", name="Use it").click()
    expect(dialog.get_by_role("alert")).to_contain_text("this API key is not known")
    dialog.get_by_label("API key").fill(key)
    dialog.get_by_role("button", name="Use it").click()
    expect(page.get_by_role("heading", name="No index yet")).to_be_visible()
    sent: list[str | None] = []
    page.on("request", lambda one: sent.append(one.headers.get("authorization")) if "/jobs/" in one.url else None)
    page.goto("/#/jobs/job_none")
    expect(page.get_by_role("alert")).to_contain_text("there is no job 'job_none'")
    assert sent == [f"Bearer {key}"]
    assert page.evaluate("[localStorage.length, document.cookie]") == [0, ""]
    other = look("#/jobs", api)
    expect(other.get_by_role("dialog")).to_be_visible()
