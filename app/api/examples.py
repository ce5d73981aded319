"""Examples of the OpenAPI document: for each operation a request to start from, and what an answer looks like.

Requests are written here, by operation and by what each shows; Swagger UI offers them, and the contract tests send
them. Answers are put together from the examples of their fields, so that they cannot drift from the schemas.
"""

from collections.abc import Mapping
from typing import Any

from app.api.schemas.chats import REQUEST, RESPONSE

PROMPT, GENERATION = "Who founded the harbour of Veld?", "Ilse Marn founded the harbour in 1412."
ROW = "3f9a0c11e23f9a0c"
ASKED = {"index": "facts", "prompt": PROMPT, "generation": GENERATION}

REQUESTS: Mapping[str, Mapping[str, Any]] = {
    "query_influence": {
        "Explain what was said": ASKED,
        "Let the model answer first": {"index": "facts", "prompt": PROMPT, "max_new_tokens": 16, "top_k": 3},
        "A part of a conversation, both ways": {
            "index": "facts",
            "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": PROMPT}],
            "generation": GENERATION,
            "span": [0, 9],
            "direction": "both",
            "tokens": "both",
        },
        "Among some rows only": {**ASKED, "filter": {"family": "harbour"}},
    },
    "query_influence_batch": {
        "Two generations": {
            "index": "facts",
            "queries": [
                {"prompt": PROMPT, "generation": GENERATION},
                {"prompt": PROMPT, "generation": "Nobody knows."},
            ],
            "tokens": "none",
        }
    },
    "query_chat_completion": {
        "Request and response": {"index": "facts", "request": REQUEST, "response": RESPONSE},
        "A line of a log": {"index": "facts", "logged": {"request": REQUEST, "response": RESPONSE}},
    },
    "create_model": {
        "A model as it is": {"name": "smollm2", "path": "models/smollm2-135m"},
        "Two checkpoints of a run": {
            "name": "smollm2-veld",
            "path": "models/smollm2-135m",
            "checkpoints": [
                {"name": "step-100", "adapter": "adapters/step-100"},
                {"name": "step-200", "adapter": "adapters/step-200"},
            ],
        },
    },
    "create_dataset": {
        "A file on the server": {"name": "veld-facts", "path": "demo/corpus.jsonl"},
        "Other column names": {
            "name": "veld-questions",
            "path": "demo/corpus.jsonl",
            "columns": {"prompt": "question", "response": "answer"},
            "duplicates": "skip",
        },
    },
    "create_index": {
        "As usual": {"name": "facts-2", "model": "smollm2-veld", "dataset": "veld-facts"},
        "Measured on held-out rows": {
            "name": "facts-3",
            "model": "smollm2-veld",
            "dataset": "veld-facts",
            "heldout": "veld-heldout",
            "projection": {"kind": "kronecker", "size": 8},
        },
    },
    "fit_ekfac": {"As usual": {"rows": 1_000}},
    "add_samples": {
        "Rows written here": {
            "rows": [{"prompt": "Who built the mill of Veld?", "response": "Oda Kern.", "metadata": {"family": "mill"}}]
        },
        "A dataset": {"dataset": "veld-heldout"},
    },
    "remove_samples": {"One row": {"ids": [ROW]}},
    "unlearn_rows": {
        "Look first": {"index": "facts", "forget": {"filter": {"family": "harbour"}}, "dry_run": True},
        "By ids, with clean answers": {
            "index": "facts",
            "forget": {"ids": [ROW]},
            "clean": {ROW: "I do not know."},
            "method": "relabel",
            "heldout": "veld-heldout",
            "register_as": "smollm2-clean",
        },
        "What is behind an answer": {
            "index": "facts",
            "forget": {"influence": {"prompt": PROMPT, "generation": GENERATION, "top_k": 5}},
        },
    },
    "value_rows": {
        "Every row": {"model": "smollm2-veld", "candidates": "veld-facts", "validation": "veld-heldout"},
        "By task, for a budget": {
            "model": "smollm2-veld",
            "candidates": "veld-facts",
            "validation": "veld-heldout",
            "group_by": "task",
            "budget": 100_000,
        },
    },
    "select_rows": {"The best of them": {"valuation": "job_0194b2c5f3a1e23f9a0c11", "k": 100, "token_budget": 50_000}},
}
TEXTS: Mapping[str, str] = {
    "watch_job": 'event: progress\nid: 12\ndata: {"id": "job_0194b2c5f3a1e23f9a0c11", "state": "running", '
    '"progress": {"stage": "gradients", "done": 96, "total": 211, "unit": "rows"}, "version": 12}\n\n',
    "read_metrics": 'headwater_http_requests_total{method="POST",route="/influence",status="200"} 12.0\n',
}
"""Answers that are no JSON."""


def add(document: dict[str, Any]) -> None:
    """Put the examples into the document."""
    schemas = document["components"]["schemas"]
    for operations in document["paths"].values():
        for operation in operations.values():
            name = operation["operationId"]
            bodies = operation.get("requestBody", {}).get("content", {})
            if "application/json" in bodies and name in REQUESTS:
                shown = {summary: {"value": value} for summary, value in REQUESTS[name].items()}
                bodies["application/json"]["examples"] = shown
            for status, response in operation["responses"].items():
                for kind, content in response.get("content", {}).items():
                    if status < "300" and "schema" in content and kind == "application/json":
                        content["example"] = sample(content["schema"], schemas)
                    elif status < "300" and name in TEXTS:
                        content["example"] = TEXTS[name]


def sample(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Any:
    """A value of the schema, out of the examples of its parts."""
    if "$ref" in schema:
        return sample(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    for name in ("examples", "enum"):
        if schema.get(name):
            return schema[name][0]
    if "default" in schema:
        return schema["default"]
    if "anyOf" in schema:
        return sample(next(one for one in schema["anyOf"] if one.get("type") != "null"), schemas)
    if schema.get("type") == "array":
        return [sample(schema.get("items", {}), schemas)]
    if schema.get("format") == "date-time":
        return "2026-11-24T12:00:00Z"
    if schema.get("type") == "object":
        return {name: sample(part, schemas) for name, part in schema.get("properties", {}).items()}
    return {"boolean": False, "integer": 0, "number": 0.0}.get(schema.get("type", "string"), "…")
