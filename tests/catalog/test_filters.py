"""A condition says the same of every row on both databases: what Python says of it."""

import json
import operator
from typing import Any

import pytest
from sqlalchemy import text

from app.catalog.catalog import Catalog
from app.catalog.copying import NewSample
from app.catalog.database import Database
from app.catalog.filters import Condition
from app.catalog.tables import Dataset, IndexRow, Model
from app.catalog.types import new_id

MISSING = object()
VALUES: list[Any] = [
    MISSING, None, True, False, 0, 1, -1, 1.0, 1.5, 2, 10, 2**62, 0.1, "", "1", "a", "b", "ab", "é", "ä", "z", "Z", "☂",
    "a'b", 'say "so"', "50%", "\\n", "\n", "true", "null", ["a"], {"a": 1}, [], {},
]  # fmt: skip
SCALARS = [value for value in VALUES if value is not MISSING and not isinstance(value, list | dict)]
FIELDS = ("f", "größe", "a.b", "it's", "$[0]", " ", "ne", "50%:x")
ORDER = {"lt": operator.lt, "lte": operator.le, "gt": operator.gt, "gte": operator.ge}


def same(one: Any, other: Any) -> bool:
    """Equal, and of one kind: true is not 1."""
    if isinstance(one, bool) or isinstance(other, bool) or one is None or other is None:
        return one is other
    numbers = isinstance(one, int | float) and isinstance(other, int | float)
    return (numbers or type(one) is type(other)) and bool(one == other)


def holds(value: Any, condition: Condition) -> bool:
    wanted: Any = condition.value
    if condition.operator == "exists":
        return (value is not MISSING) == wanted
    if condition.operator in ORDER:
        if isinstance(value, bool) or isinstance(value, str) != isinstance(wanted, str):
            return False
        return isinstance(value, int | float | str) and bool(ORDER[condition.operator](value, wanted))
    found = any(same(value, one) for one in (wanted if isinstance(wanted, tuple) else (wanted,)))
    return found != (condition.operator == "ne")


async def add(catalog: Catalog, metadata: list[dict[str, Any]], name: str = "facts") -> Dataset:
    made = Dataset(id=new_id("dst"), name=name, source="here", columns={}, rows=len(metadata), content_hash="0")
    await catalog.datasets.add(made, [NewSample(f"{n:016x}", "{}", one) for n, one in enumerate(metadata)])
    return made


def conditions(field: str, scalars: list[Any]) -> list[Condition]:
    found = [Condition(field, name, value) for name in ("eq", "ne") for value in scalars]  # type: ignore[arg-type]
    ordered = [value for value in scalars if value is not None and not isinstance(value, bool)]
    found += [Condition(field, name, value) for name in ORDER for value in ordered]  # type: ignore[arg-type]
    found += [Condition(field, "exists", value) for value in (True, False)]
    return [*found, Condition(field, "in", tuple(scalars[:5])), Condition(field, "in", ("a", 1, None, "ä"))]


async def check(catalog: Catalog, metadata: list[dict[str, Any]], asked: list[Condition]) -> None:
    dataset = await add(catalog, metadata, new_id("rows"))
    for condition in asked:
        page = await catalog.datasets.samples(dataset.id, 500, -1, [condition])
        expected = [n for n, one in enumerate(metadata) if holds(one.get(condition.field, MISSING), condition)]
        assert [sample.ordinal for sample in page.items] == expected, condition


async def test_every_operator_says_of_every_value_what_python_says(database: Database) -> None:
    async with database.catalog() as catalog:
        await check(catalog, [{} if value is MISSING else {"f": value} for value in VALUES], conditions("f", SCALARS))


@pytest.mark.parametrize("field", FIELDS)
async def test_a_field_may_have_any_name(database: Database, field: str) -> None:
    metadata: list[dict[str, Any]] = [{field: "a"}, {field: 1}, {"f": "a"}, {"a": {"b": "a"}}, {}, {"size": 1}]
    async with database.catalog() as catalog:
        await check(catalog, metadata, conditions(field, ["a", 1, "b"]))


async def test_conditions_are_all_to_hold_and_pages_go_on(database: Database) -> None:
    metadata = [{"n": n, "kind": "odd" if n % 2 else "even"} for n in range(40)]
    asked = [Condition("kind", "eq", "odd"), Condition("n", "gte", 10), Condition("n", "lt", 30)]
    found, after = [], -1
    async with database.catalog() as catalog:
        dataset = await add(catalog, metadata)
        while True:
            page = await catalog.datasets.samples(dataset.id, 3, after, asked)
            found += [sample.extra["n"] for sample in page.items]
            if page.next_cursor is None:
                break
            after = int(page.next_cursor)
    assert found == list(range(11, 30, 2))


async def test_the_rows_of_an_index_are_those_of_its_datasets(database: Database) -> None:
    async with database.catalog() as catalog:
        one, other = await add(catalog, [{"f": n} for n in range(4)]), await add(catalog, [{"f": 2}], "other")
        model = Model(id=new_id("mdl"), name="m", spec={}, fingerprint={}, attributed=[], skipped=[], context_length=1)
        await catalog.models.add(model)
        for name, dataset in (("a", one), ("b", other)):
            await catalog.indexes.add(
                IndexRow(id=f"idx_{name}", name=name, model_id=model.id, dataset_id=dataset.id, spec={})
            )
        asked = [Condition("f", "gte", 2)]
        assert await catalog.datasets.matching("idx_a", asked) == {f"{2:016x}", f"{3:016x}"}
        assert await catalog.datasets.matching("idx_b", asked) == {f"{0:016x}"}
        assert await catalog.datasets.matching("idx_a", [Condition("f", "eq", 9)]) == frozenset()


async def test_postgres_finds_equal_values_in_the_index(database: Database) -> None:
    metadata = [{"f": n, "more": "x" * 50} for n in range(3000)]
    async with database.catalog() as catalog:
        dataset = await add(catalog, metadata)
        await catalog.commit()
        page = await catalog.datasets.samples(dataset.id, 10, -1, [Condition("f", "eq", 2999)])
        assert [sample.extra["f"] for sample in page.items] == [2999]
        if database.embedded:
            return
        session = catalog._session
        await session.execute(text("ANALYZE samples"))
        query = "EXPLAIN (FORMAT JSON) SELECT * FROM samples WHERE metadata @> CAST(:wanted AS jsonb)"
        plan = (await session.execute(text(query), {"wanted": '{"f": 2999}'})).scalar_one()
        assert "ix_samples_metadata" in json.dumps(plan)
