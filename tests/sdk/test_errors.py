"""The exceptions mirror the service's problem types, in one tree that is drawn at the top of the file."""

import ast
import re
from http import HTTPStatus
from pathlib import Path

import pytest

from app.problems import KINDS as SERVED
from headwater_client import errors
from tests.test_house import ROOT

NO_ANSWER = "client-closed-request"  # nobody is there to be told


def slugs_of(path: Path) -> set[str]:
    """The problem types that a file refuses with."""
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    refusals = [call for call in calls if ast.unparse(call.func) in ("Refusal", "make") and len(call.args) > 1]
    return {str(one.args[1].value) for one in refusals if isinstance(one.args[1], ast.Constant)}


SLUGS = sorted(
    {slug for _, slug in SERVED.values()}.union(*(slugs_of(path) for path in (ROOT / "app").rglob("*.py")))
    - {NO_ANSWER}
)


@pytest.mark.parametrize("slug", SLUGS)
def test_every_problem_type_has_its_exception(slug: str) -> None:
    assert slug in errors.KINDS, "a line in headwater_client/errors.py"


@pytest.mark.parametrize("slug", errors.KINDS)
def test_no_exception_is_of_a_type_that_does_not_exist(slug: str) -> None:
    of_statuses = {status.phrase.lower().replace(" ", "-") for status in HTTPStatus}
    assert slug in SLUGS or slug in of_statuses


def test_the_tree_that_is_drawn_is_the_tree_that_is() -> None:
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")

    def below(kind: type) -> list[str]:
        return [name for one in kind.__subclasses__() for name in (one.__name__, *below(one))]

    assert sorted(drawn) == sorted(below(errors.HeadwaterError))
    for slug, kind in errors.KINDS.items():
        line = next(one for one in re.split(r"[├└]── ", errors.__doc__ or "") if one.startswith(f"{kind.__name__} "))
        assert slug in re.split(r"[\s,:]+", line) or kind is errors.InvalidRequest, f"{slug} is not drawn"


def test_a_problem_tells_all_that_the_service_told() -> None:
    body = {
        "type": "urn:headwater:problem:invalid-request",
        "title": "Invalid request",
        "detail": "top_k: too small",
        "errors": [{"field": "top_k", "message": "too small"}],
        "request_id": "r1",
    }
    found = errors.problem(422, body, 2.0)
    assert isinstance(found, errors.InvalidRequest)
    assert found.errors == (errors.FieldError("top_k", "too small"),)
    assert (found.request_id, found.retry_after, found.status) == ("r1", 2.0, 422)
    assert str(found) == "top_k: too small (invalid-request, HTTP 422)"
