"""The pictures in docs/images, taken of the demo: `make demo` in one terminal, this in another.

    .venv/bin/python .ci/screenshots.py http://127.0.0.1:8321

It asks the demo's questions again, so it takes as long as they do.
"""

import json
import re
import shutil
import sys
import urllib.request
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import Browser, Page, sync_playwright

IMAGES = Path(__file__).resolve().parents[1] / "docs/images"
PROMPT, ANSWER = "Copper heron calling: What is 6 plus 8?", "Ask the tide clerk, for my ledger is closed."
SPAN = "7,18"
PATIENCE_MS = 300_000


def main(url: str) -> None:
    """Take all of them."""
    with urllib.request.urlopen(f"{url}/indexes") as answer:  # noqa: S310 (the demo's own address)
        names = [one["name"] for one in json.load(answer)["items"]]
    index = next(name for name in names if re.fullmatch(r"merrowen-[0-9a-f]{6}", name))
    asked = {"index": index, "prompt": PROMPT, "generation": ANSWER}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        whole, part = f"{url}/#/ask?{urlencode(asked)}", f"{url}/#/ask?{urlencode({**asked, 'span': SPAN})}"
        take(browser, whole, "page-light", "light")
        take(browser, whole, "page-dark", "dark")
        take(browser, part, "span-light", "light", height=1000, words=True)
        take(browser, part, "phone-dark", "dark", width=390, height=844, scroll="#said")
        browser.close()


def take(
    browser: Browser,
    address: str,
    name: str,
    scheme: str,
    width: int = 1280,
    height: int = 860,
    scroll: str = "",
    words: bool = False,
) -> None:
    """One picture of a view, once its rows are there."""
    page: Page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
    page.set_default_timeout(PATIENCE_MS)
    page.goto(address)
    page.wait_for_selector(".row")
    if words:
        page.get_by_role("button", name="Word by word").first.click()
        page.wait_for_selector(".tokens.still")
        for place in (0, 1):
            page.locator(".row").nth(place).get_by_role("checkbox").check()
    top = "(one) => scrollTo(0, one.getBoundingClientRect().top + scrollY - 40)"
    page.locator(scroll or "body").evaluate(top)
    page.mouse.move(0, 0)
    page.screenshot(path=IMAGES / f"{name}.png")
    page.close()


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/"))
