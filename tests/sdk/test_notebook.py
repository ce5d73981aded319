"""The example notebook runs from its first cell to its last, against a real service."""

import ast
import json
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pytest

from tests.api.harness import Api, must
from tests.test_house import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def cells(notebook: Path) -> list[dict[str, Any]]:
    return [one for one in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if one["cell_type"] == "code"]


def run(source: str, names: dict[str, Any]) -> Any:
    """Run a cell as a notebook does: the value of its last expression is what it shows."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, "cell", "exec"), names)
    return eval(compile(ast.Expression(last.value), "cell", "eval"), names) if isinstance(last, ast.Expr) else None


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_runs(service: Api, monkeypatch: pytest.MonkeyPatch, notebook: Path) -> None:
    mpl.use("agg")
    monkeypatch.setenv("HEADWATER_URL", str(service.base_url))
    before = must(service.get("/datasets"))["items"]
    names: dict[str, Any] = {}
    shown = [run("".join(cell["source"]), names) for cell in cells(notebook)]
    pages = [one._repr_html_() for one in shown if hasattr(one, "_repr_html_")]
    assert any("<table" in page and "white-space:pre-wrap" in page for page in pages)
    assert names["answer"].proponents[0].id == names["known"].id
    assert any(one is True for one in shown)  # the logged chat found the same rows
    assert must(service.get("/datasets"))["items"] == before


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.name)
def test_a_notebook_is_kept_without_outputs(notebook: Path) -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells(notebook))
