"""The page and its files: open to everybody, under a policy that lets nothing else load or run."""

import re
from pathlib import Path

import pytest

from app.api import ui
from tests.api.harness import Api, problem

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(ui.FOLDER.glob("*.js"))


def test_the_page_and_all_that_it_loads_are_open_where_keys_are_needed(asked_locked: Api) -> None:
    page = asked_locked.get("/")
    assert page.headers["content-type"].startswith("text/html")
    loaded = {*re.findall(r'(?:src|href)="(/ui/[^"]+)"', page.text)}
    for script in SCRIPTS:
        loaded |= {f"/ui/{name}" for name in re.findall(r'from "\./([^"]+)"', script.read_text(encoding="utf-8"))}
    assert loaded == ui.ASSETS.keys(), "every file is loaded, and every file that is loaded is there"
    for address in loaded:
        assert asked_locked.get(address).status_code == 200


def test_its_policy_lets_scripts_and_styles_of_its_own_alone(asked: Api) -> None:
    policy = asked.get("/").headers["content-security-policy"]
    assert "unsafe" not in policy
    assert "http" not in policy
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
    text = asked.get("/").text
    assert not re.findall(r"<script(?![^>]*src=)|<style| style=| on\w+=", text)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_no_script_makes_markup_out_of_text(script: Path) -> None:
    code = script.read_text(encoding="utf-8")
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|https?://(?!www\.w3)", code
    )


def test_a_file_that_the_browser_has_is_not_sent_again(asked: Api) -> None:
    first = asked.get("/ui/main.js")
    assert first.headers["cache-control"] == "no-cache"
    again = asked.get("/ui/main.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize("name", ["index.html", "..%2fmain.py", "nothing.js"])
def test_no_other_file_is_served(asked: Api, name: str) -> None:
    problem(asked.get(f"/ui/{name}"), 404, "not-found")
