"""The SDK has every operation, every field of a request and every field of an answer of the OpenAPI document."""

import json
import typing
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel

from app.openapi import TARGET
from headwater_client import AsyncClient, Client, _operations, client, fields, jobs
from headwater_client._facade import Described
from headwater_client._operations import OPERATIONS, Operation

DOCUMENT: dict[str, Any] = json.loads(TARGET.read_text(encoding="utf-8"))
SCHEMAS: dict[str, Any] = DOCUMENT["components"]["schemas"]
SERVED = {
    operation["operationId"]: (method.upper(), path, operation)
    for path, methods in DOCUMENT["paths"].items()
    for method, operation in methods.items()
}
BLOCKING = (Client, client.Models, client.Datasets, client.Indexes, client.Valuations, client.Jobs)
AWAITING = (
    AsyncClient,
    client.AsyncModels,
    client.AsyncDatasets,
    client.AsyncIndexes,
    client.AsyncValuations,
    client.AsyncJobs,
)
OF_A_JOB = {"get_job", "watch_job", "cancel_job", "retry_job", "list_artifacts", "get_artifact"}
"""Operations that are methods of a job; tests/sdk/test_live.py calls each."""
BODIES = {
    "query_influence": (fields.InfluenceFields, {"index"}),
    "query_influence_batch": (fields.BatchFields, {"index", "queries"}),
    "query_chat_completion": (fields.ChatFields, {"index"}),
    "create_model": (fields.ModelFields, {"name", "path"}),
    "create_dataset": (fields.DatasetFields, {"name", "path"}),
    "create_index": (fields.IndexFields, {"name", "model", "dataset"}),
    "fit_ekfac": (fields.EkfacFields, set()),
    "add_samples": (fields.SamplesFields, set()),
    "remove_samples": (fields.Extra, {"ids"}),
    "unlearn_rows": (fields.UnlearnFields, {"forget", "dry_run"}),
    "value_rows": (fields.ValuationFields, {"model", "candidates", "validation"}),
    "select_rows": (fields.SelectFields, {"valuation", "k"}),
}
"""The keyword arguments of each operation with a body, and what it takes besides."""
OURS = {"extra", "idempotency_key"}


def test_every_operation_of_the_document_is_in_the_sdk_as_it_is_served() -> None:
    ours = {(one.id, one.method, one.path, one.makes) for one in OPERATIONS}
    takes_key = {
        name
        for name, (_, _, operation) in SERVED.items()
        if any(parameter["name"] == "Idempotency-Key" for parameter in operation.get("parameters", []))
    }
    assert ours == {(name, method, path, name in takes_key) for name, (method, path, _) in SERVED.items()}


def test_an_operation_that_may_be_repeated_reads_asks_or_takes_a_key() -> None:
    asking = {"query_influence", "query_influence_batch", "query_chat_completion", "select_rows"}
    for one in OPERATIONS:
        assert one.repeatable == (one.makes or one.method == "GET" or one.id in asking), one.id


@pytest.mark.parametrize("kinds", [BLOCKING, AWAITING], ids=["Client", "AsyncClient"])
def test_every_operation_is_a_method_of_both_clients(kinds: tuple[type, ...]) -> None:
    methods = {
        described.operation.id
        for kind in kinds
        for described in vars(kind).values()
        if isinstance(described, Described)
    }
    assert methods | OF_A_JOB == set(SERVED)


def test_the_two_clients_have_the_same_methods() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    for blocking, awaiting in [*zip(BLOCKING, AWAITING, strict=True), (jobs.Job, jobs.AsyncJob)]:
        assert public(blocking) == public(awaiting)


@pytest.mark.parametrize("name", [name for name, (_, _, one) in SERVED.items() if "requestBody" in one])
def test_a_request_has_the_fields_that_the_service_takes(name: str) -> None:
    body = SERVED[name][2]["requestBody"]["content"]["application/json"]["schema"]
    served = set(resolved(body)["properties"])
    assert name in BODIES, "an operation with a body: say here which keyword arguments it takes"
    taken, besides = BODIES[name]
    said = f"a line in headwater_client/fields.py, {taken.__name__}"
    assert set(taken.__annotations__) | inherited(taken) - OURS | besides >= served, said
    assert (set(taken.__annotations__) | inherited(taken)) - OURS <= served, f"too much: {said}"


def inherited(kind: Any) -> set[str]:
    return set(typing.get_type_hints(kind))


NESTED = {
    "QueryIn": fields.Query,
    "CheckpointIn": fields.CheckpointFields,
    "ColumnsIn": fields.Columns,
    "ProjectionIn": fields.Projection,
    "InlineRow": fields.Row,
    "ForgetIn": fields.Forget,
    "ByInfluenceIn": fields.ByInfluence,
    "RetainIn": fields.Retain,
    "ParametersIn": fields.Parameters,
    "StudentIn": fields.StudentFields,
    "Message": fields.Message,
}


@pytest.mark.parametrize("name", NESTED)
def test_a_part_of_a_request_has_the_fields_that_the_service_takes(name: str) -> None:
    assert inherited(NESTED[name]) == set(SCHEMAS[name]["properties"])


def test_every_part_of_a_request_is_compared() -> None:
    used: set[str] = set()

    def walk(node: Any) -> None:
        for reference in references(node):
            if reference not in used:
                used.add(reference)
                walk(SCHEMAS[reference])

    whole = set()
    for _, _, operation in SERVED.values():
        body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
        whole |= set(references(body))
        walk(body)
    assert used - whole == set(NESTED)


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        if "$ref" in node:
            yield node["$ref"].rpartition("/")[2]
        for value in node.values():
            yield from references(value)
    elif isinstance(node, list):
        for value in node:
            yield from references(value)


def resolved(schema: Any) -> Any:
    whole = next((one for one in schema.get("anyOf", ()) if "$ref" in one), schema)  # a body that may be left out
    return SCHEMAS[whole["$ref"].rpartition("/")[2]] if "$ref" in whole else whole


def answers() -> Iterator[tuple[Operation[Any, Any], Any]]:
    """Each operation that answers with JSON, and what the document says of its answer."""
    for one in OPERATIONS:
        responses = SERVED[one.id][2]["responses"]
        status = "200" if one.build.__name__ == "preview_unlearn" else min(responses)
        if one.build.__name__ == "unlearn_rows":
            status = "202"
        schema = responses[status].get("content", {}).get("application/json", {}).get("schema")
        if schema and one.id != "get_artifact" and one.build.__name__ != "get_result":
            yield one, schema


@pytest.mark.parametrize(("one", "schema"), list(answers()), ids=lambda value: getattr(value, "id", ""))
def test_an_answer_has_the_fields_that_the_service_sends(one: Operation[Any, Any], schema: Any) -> None:
    names = dict.fromkeys(("name", "path", "model", "dataset", "index", "candidates", "validation"), "x")
    arguments: dict[str, Any] = {**names, "valuation": "x", "job": "x", "ids": [], "queries": [], "k": 1, "rows": b""}
    arguments |= {"forget": {}, "request": {}, "response": {}}
    wanted = typing.get_type_hints(one.build, include_extras=False)
    made = one.build(**{name: value for name, value in arguments.items() if name in wanted})
    shape: type[BaseModel] = made.read.shape  # type: ignore[attr-defined]
    own = shape.model_json_schema()
    compare(schema, own, own.get("$defs", {}), one.id)


def compare(served: Any, own: Any, definitions: dict[str, Any], where: str) -> None:
    """Fail where the service says a field that the SDK does not know."""
    if "$ref" in served:
        served = SCHEMAS[served["$ref"].rpartition("/")[2]]
    if "$ref" in own:
        own = definitions[own["$ref"].rpartition("/")[2]]
    for name, part in served.get("properties", {}).items():
        assert name in own["properties"], f"{where}.{name}: a line in headwater_client/models.py"
        compare(part, own["properties"][name], definitions, f"{where}.{name}")
    for name in ("items", "additionalProperties"):
        if isinstance(served.get(name), dict) and isinstance(own.get(name), dict):
            compare(served[name], own[name], definitions, f"{where}.{name}")
    if "anyOf" in served and "anyOf" in own:
        for part, mine in zip(served["anyOf"], own["anyOf"], strict=True):
            compare(part, mine, definitions, where)


def test_the_names_of_operations_are_those_of_the_document() -> None:
    assert all(hasattr(_operations, name) for name in SERVED)
