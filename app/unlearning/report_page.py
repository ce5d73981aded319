"""The report for people: one page that asks nothing of anybody."""

from __future__ import annotations

import html
from collections.abc import Mapping
from typing import Any


def page(report: Mapping[str, Any]) -> str:
    """HTML with inline SVG; no script, no file from elsewhere."""
    rows = []
    for name, states in report["measures"].items():
        cells = "".join(f"<td>{_cell(states.get(state))}</td>" for state in ("before", "after", "oracle"))
        rows.append(f"<tr><th>{html.escape(name)}</th>{cells}<td>{html.escape(report['definitions'][name])}</td></tr>")
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Unlearning report</title>"
        f"<h1>Unlearning: {html.escape(report['method'])}</h1><table>{''.join(rows)}</table></html>"
    )


def _cell(estimate: Mapping[str, float] | None) -> str:
    if estimate is None:
        return "–"  # noqa: RUF001
    return f"{estimate['value']:.3g} [{estimate['low']:.3g}, {estimate['high']:.3g}]"
