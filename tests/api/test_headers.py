"""What a browser is told, and a documentation page that needs nobody else."""

import base64
import hashlib
import re

import pytest

from tests.api.harness import Api, must, problem


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "/healthz"), ("GET", "/nowhere"), ("POST", "/influence"), ("GET", "/docs"), ("PUT", "/")],
)
def test_every_answer_may_be_framed_by_nobody_and_taken_for_nothing_else(asked: Api, method: str, path: str) -> None:
    headers = asked.request(method, path).headers
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"


def test_what_is_not_a_page_may_load_nothing(asked: Api) -> None:
    assert asked.get("/models").headers["content-security-policy"].startswith("default-src 'none'; frame")


def test_the_docs_page_loads_from_here_alone_and_its_policy_lets_it(asked: Api) -> None:
    answer = asked.get("/docs")
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["content-security-policy"].split(";"))
    loaded = re.findall(r'(?:src|href)="([^"]+)"', answer.text)
    assert loaded
    for address in loaded:
        assert address.startswith("/docs/")
        assert asked.get(address).status_code == 200
    (script,) = re.findall(r"<script>(.*?)</script>", answer.text, re.DOTALL)
    assert base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() in policy["script-src"]
    assert "unsafe" not in policy["script-src"]
    assert "url: '/openapi.json'" in script
    assert must(asked.get("/openapi.json"))["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"


def test_swagger_ui_is_really_there(asked: Api) -> None:
    script = asked.get("/docs/swagger-ui-bundle.js")
    assert "javascript" in script.headers["content-type"]
    assert b"SwaggerUIBundle" in script.content
    assert "text/css" in asked.get("/docs/swagger-ui.css").headers["content-type"]


@pytest.mark.parametrize("name", ["redoc.standalone.js", "..%2f__init__.py", "%2e%2e"])
def test_no_other_file_is_served(asked: Api, name: str) -> None:
    problem(asked.get(f"/docs/{name}"), 404, "not-found")
