"""Metadata filters on the wire: a JSON object of field and value, or of field and conditions."""

import json
import math
from typing import Annotated, Any, get_args

from pydantic import WithJsonSchema

from app.catalog.filters import ORDER, Condition, Operator, Scalar
from app.problems import Refusal

MOST_FIELDS, MOST_VALUES, LONGEST = 20, 100, 1000
INT64 = range(-(2**63), 2**63)
OPERATORS: tuple[Operator, ...] = get_args(Operator)

FILTER = (
    "Only rows whose metadata are so: an object of field and value (equal), or of field and conditions out of `eq`, "
    "`ne`, `in`, `lt`, `lte`, `gt`, `gte`, `exists`. All must hold. `ne` also holds where the field is missing; "
    "numbers are compared with numbers and texts with texts."
)
EXAMPLE: dict[str, Any] = {"topic": "people", "year": {"gte": 1400, "lt": 1500}}
_SCALAR: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "maxLength": LONGEST},
        {"type": "integer", "minimum": INT64.start, "maximum": INT64.stop - 1},
        {"type": "number"},
        {"type": "boolean"},
        {"type": "null"},
    ]
}
_ORDERED = {"anyOf": _SCALAR["anyOf"][:3]}
_CONDITIONS = {
    "type": "object",
    "minProperties": 1,
    "additionalProperties": False,
    "properties": {
        "eq": _SCALAR,
        "ne": _SCALAR,
        "in": {"type": "array", "minItems": 1, "maxItems": MOST_VALUES, "items": _SCALAR},
        **dict.fromkeys(ORDER, _ORDERED),
        "exists": {"type": "boolean"},
    },
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "maxProperties": MOST_FIELDS,
    "propertyNames": {"minLength": 1, "maxLength": LONGEST, "pattern": r'^[^"\\\u0000-\u001f]*$'},
    "additionalProperties": {"anyOf": [*_SCALAR["anyOf"], _CONDITIONS]},
}
Filter = Annotated[dict[str, Any], WithJsonSchema(SCHEMA)]


def parse_text(text: str | None) -> tuple[Condition, ...]:
    """The filter of a query parameter, which is JSON.

    Raises:
        Refusal: 422, with the path of what is wrong.
    """
    if text is None:
        return ()
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _refusal("", f"the filter is not JSON: {error}") from error
    if not isinstance(raw, dict):
        raise _refusal("", 'the filter is a JSON object, like {"topic": "people"}')
    return parse(raw)


def parse(raw: dict[str, Any] | None) -> tuple[Condition, ...]:
    """The conditions of a filter.

    Raises:
        Refusal: 422, with the path of what is wrong.
    """
    raw = raw or {}
    if len(raw) > MOST_FIELDS:
        raise _refusal("", f"a filter may have at most {MOST_FIELDS} fields")
    found = []
    for field, wanted in raw.items():
        _check_field(field)
        for name, value in (wanted if isinstance(wanted, dict) else {"eq": wanted}).items():
            where = f"{field}.{name}" if isinstance(wanted, dict) else field
            operator = _operator(where, name)
            found.append(Condition(field, operator, _value(where, operator, value)))
        if wanted == {}:
            raise _refusal(field, f"name a condition: {', '.join(OPERATORS)}")
    return tuple(found)


def _check_field(field: str) -> None:
    if not 0 < len(field) <= LONGEST or not _is_text(field) or any(c in '"\\' or ord(c) < 32 for c in field):
        raise _refusal(
            "",
            f"{field[:50]!r} cannot be filtered by: a field has 1 to {LONGEST} characters, none of them a quotation "
            "mark, a backslash or a control character",
        )


def _operator(where: str, name: str) -> Operator:
    for operator in OPERATORS:
        if operator == name:
            return operator
    raise _refusal(where, f"{name[:50]!r} is no condition: use {', '.join(OPERATORS)}")


def _value(where: str, operator: Operator, value: object) -> Scalar | tuple[Scalar, ...]:
    if operator == "exists":
        if not isinstance(value, bool):
            raise _refusal(where, "`exists` is true or false")
        return value
    if operator == "in":
        if not isinstance(value, list) or not 0 < len(value) <= MOST_VALUES:
            raise _refusal(where, f"`in` is a list of 1 to {MOST_VALUES} values")
        return tuple(_scalar(f"{where}.{place}", one) for place, one in enumerate(value))
    found = _scalar(where, value)
    if operator in ORDER and (found is None or isinstance(found, bool)):
        raise _refusal(where, f"`{operator}` compares with a number or a text")
    return found


def _scalar(where: str, value: object) -> Scalar:
    if isinstance(value, str):
        if len(value) > LONGEST or "\0" in value or not _is_text(value):
            raise _refusal(where, f"a text has at most {LONGEST} Unicode characters, and no NUL")
        return value
    if isinstance(value, int):  # a bool as well
        if value not in INT64:
            raise _refusal(where, "an integer has at most 64 bits")
        return value
    if isinstance(value, float):
        if not math.isfinite(value):
            raise _refusal(where, "a number is finite")
        return value
    if value is None:
        return None
    raise _refusal(where, "a value is a text, a number, true, false or null")


def _is_text(text: str) -> bool:
    """Whether it is Unicode: JSON can escape half a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _refusal(where: str, detail: str) -> Refusal:
    # a half of a surrogate pair in a path could not be written into the answer
    path = f"filter.{where}".encode(errors="replace").decode() if where else "filter"
    return Refusal(422, "invalid-request", f"{path}: {detail}", field=path)
