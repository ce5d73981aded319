"""The OpenAPI document: checked in as served, and good enough to learn from."""

from typing import Any

from jsonschema import Draft202012Validator

from app.main import create_app
from app.openapi import TARGET, render

DOCUMENT: dict[str, Any] = create_app().openapi()
OPERATIONS = [
    (method, path, operation) for path, methods in DOCUMENT["paths"].items() for method, operation in methods.items()
]


def test_the_document_that_is_checked_in_is_the_one_that_is_served() -> None:
    assert TARGET.read_text(encoding="utf-8") == render(), "it drifted: run `make openapi`"


def test_operation_ids_are_unique_and_readable() -> None:
    ids = [operation["operationId"] for _, _, operation in OPERATIONS]
    assert len(ids) == len(set(ids))
    assert all(one.replace("_", "").isalpha() and one.islower() for one in ids)


def test_every_error_is_documented_as_a_problem() -> None:
    assert "HTTPValidationError" not in DOCUMENT["components"]["schemas"]
    for method, path, operation in OPERATIONS:
        for status, response in operation["responses"].items():
            if int(status) >= 400:
                assert list(response["content"]) == ["application/problem+json"], (method, path, status)


def test_every_field_and_parameter_is_described() -> None:
    for name, schema in DOCUMENT["components"]["schemas"].items():
        for field, about in schema.get("properties", {}).items():
            assert about.get("description") or "$ref" in about, f"{name}.{field}"
    for method, path, operation in OPERATIONS:
        assert operation["description"], (method, path)
        for parameter in operation.get("parameters", []):
            assert parameter.get("description") or parameter["schema"].get("description"), (method, path, parameter)


def test_every_operation_has_examples() -> None:
    for method, path, operation in OPERATIONS:
        body = operation.get("requestBody", {}).get("content", {}).get("application/json")
        assert body is None or body.get("examples"), (method, path, "a line in app/api/examples.py")
        for status, response in operation["responses"].items():
            for kind, content in response.get("content", {}).items():
                shown = (
                    kind in ("application/json", "text/plain", "text/event-stream") and path.count("artifacts/") == 0
                )
                assert status >= "300" or not shown or content["example"], (method, path, status, kind)


def test_an_example_of_an_answer_keeps_to_its_schema() -> None:
    schemas = {"components": DOCUMENT["components"]}
    for method, path, operation in OPERATIONS:
        for status, response in operation["responses"].items():
            content = response.get("content", {}).get("application/json", {})
            if status < "300" and "schema" in content:
                errors = list(Draft202012Validator({**content["schema"], **schemas}).iter_errors(content["example"]))
                assert not errors, (method, path, errors[0].json_path, errors[0].message)


def test_every_group_of_operations_is_described() -> None:
    used = {tag for _, _, operation in OPERATIONS for tag in operation["tags"]}
    assert {tag["name"] for tag in DOCUMENT["tags"] if tag["description"]} == used


def test_what_makes_something_takes_an_idempotency_key() -> None:
    taking = {
        operation["operationId"]
        for _, _, operation in OPERATIONS
        if any(parameter["name"] == "Idempotency-Key" for parameter in operation.get("parameters", []))
    }
    indexes = {"create_index", "repair_index", "add_samples", "fit_ekfac"}
    assert taking == {"create_model", "create_dataset", *indexes, "unlearn_rows", "value_rows"}


def test_every_reference_leads_somewhere() -> None:
    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if isinstance(node.get("$ref"), str):
                assert node["$ref"].removeprefix("#/components/schemas/") in DOCUMENT["components"]["schemas"]
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(DOCUMENT)
