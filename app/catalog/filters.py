"""Which rows, by their metadata: conditions on top-level fields, as SQL of either database.

PostgreSQL compares JSONB values, and finds equal ones in the index on `samples.metadata`. SQLite reads the field with
json_extract, and its kind with json_type. Both say the same of every row: numbers are compared with numbers and texts
with texts (by code point), and a row whose field is of another kind, or missing, is none of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import ge, gt, le, lt
from typing import Literal

from sqlalchemy import and_, collate, func, literal, not_, or_, true, type_coerce
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.sql import ColumnElement

from app.catalog.tables import Sample

Scalar = str | int | float | bool | None
Operator = Literal["eq", "ne", "in", "lt", "lte", "gt", "gte", "exists"]
ORDER = {"lt": lt, "lte": le, "gt": gt, "gte": ge}


@dataclass(frozen=True)
class Condition:
    """What a row's field must be.

    Attributes:
        field: a key of the metadata, without quotation marks, backslashes or control characters.
        operator: `ne` holds wherever `eq` does not, so also where the field is missing.
        value: a tuple for `in`, a bool for `exists`, a number or a text for `lt` to `gte`.
    """

    field: str
    operator: Operator
    value: Scalar | tuple[Scalar, ...]


def where(conditions: Sequence[Condition], dialect: str) -> list[ColumnElement[bool]]:
    """What a query for the samples that meet every condition says, in the dialect ("postgresql" or "sqlite")."""
    make = _postgresql if dialect == "postgresql" else _sqlite
    return [make(condition) for condition in conditions]


def _postgresql(condition: Condition) -> ColumnElement[bool]:
    data = type_coerce(Sample.extra, JSONB)
    field, value = condition.field, condition.value
    if condition.operator == "exists":
        has: ColumnElement[bool] = data.has_key(field)
        return has if value else not_(has)
    if condition.operator in ORDER:
        compare = ORDER[condition.operator]
        kind = func.jsonb_typeof(data[field])
        if isinstance(value, str):
            return and_(kind == "string", compare(collate(data[field].astext, "C"), value))
        return and_(kind == "number", compare(data[field], literal(value, JSONB)))
    values = value if isinstance(value, tuple) else (value,)
    equal = or_(*(data.contains({field: one}) for one in values))
    return not_(equal) if condition.operator == "ne" else equal


def _sqlite(condition: Condition) -> ColumnElement[bool]:
    path = f'$."{condition.field}"'
    kind, found = func.json_type(Sample.extra, path), func.json_extract(Sample.extra, path)
    value = condition.value
    if condition.operator == "exists":
        return kind.is_not(None) if value else kind.is_(None)
    if condition.operator in ORDER:
        return and_(kind.in_(_kinds(value)), ORDER[condition.operator](found, literal(value)))
    values = value if isinstance(value, tuple) else (value,)
    equal = or_(*(_equal(kind, found, one) for one in values))
    return equal.is_not(true()) if condition.operator == "ne" else equal


def _equal(kind: ColumnElement[str], found: ColumnElement[object], value: Scalar) -> ColumnElement[bool]:
    same = kind.in_(_kinds(value))
    return same if value is None or isinstance(value, bool) else and_(same, found == literal(value))


def _kinds(value: object) -> tuple[str, ...]:
    """What SQLite calls the kind of such a value."""
    if value is None:
        return ("null",)
    if isinstance(value, bool):
        return ("true",) if value else ("false",)
    return ("text",) if isinstance(value, str) else ("integer", "real")
