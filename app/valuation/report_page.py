"""The report for people: one page with its plots in it, that asks nothing of anybody and shows no text of a row."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse}td,th{padding:.15rem .8rem .15rem 0;text-align:right}th:first-child,"
    "td:first-child{text-align:left}.warn{background:#fff3cd;padding:.5rem 1rem}svg{max-width:100%}"
)
WIDTH, HEIGHT, EDGE = 720, 220, 36
HELPS, HARMS = "#2a7f62", "#b3423a"
SHOWN = 12
"""Most values of a metadata column in the page; the report has all of them."""


def page(report: Mapping[str, Any], prices: Mapping[str, Any] | None) -> str:
    """HTML with inline SVG; no script, no file from elsewhere."""
    found = report["summary"]
    parts = [f"<h1>Valuation: {_text(report['method'])}, normalisation {_text(report['normalize'])}</h1>"]
    parts += [f'<p class="warn">{_text(warning)}</p>' for warning in report["warnings"]]
    harm = found["negative_share"]
    share = "" if harm is None else f", {harm:.1%} of the valued ones with a negative value"
    parts.append(f"<p>{found['rows']:,} rows, {found['without_value']:,} without a value{share}.</p>")
    if found["distribution"]:
        parts += ["<h2>Distribution</h2>", _histogram(found["distribution"]["histogram"])]
        quantiles = found["distribution"]["quantiles"]
        parts.append(_table(("share of rows below", "value"), [(share, _number(v)) for share, v in quantiles.items()]))
    student = report.get("student")
    if student:
        low, high = student["held_out_spearman_95"]
        said = "to be trusted" if student["trusted"] else "too poor to trust"
        parts += [
            "<h2>Student</h2>",
            f"<p>Spearman correlation with LinFiK on {student['held_out_rows']} held-out rows: "
            f"{student['held_out_spearman']:.2f} (95 %: {low:.2f} to {high:.2f}), of the rows' "
            f"lengths alone {student['held_out_spearman_of_lengths_alone']:.2f}; {said} (from "
            f"{student['trusted_from']}).</p>",
            _table(
                ("labels", "held-out Spearman"),
                [(f"{one['labels']:,}", f"{one['spearman']:.2f}") for one in student["by_labels"]],
            ),
        ]
    for name, kinds in found["by_metadata"].items():
        parts += [f"<h2>By {_text(name)}</h2>", _kinds(name, kinds, prices)]
    parts += ["<h2>Ends</h2>", *(_ends(title, found[title]) for title in ("top", "bottom"))]
    body = "".join(parts)
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Valuation</title><style>{STYLE}</style>{body}</html>"
    )


def _histogram(histogram: Mapping[str, Sequence[float]]) -> str:
    """Bars by value; those left of zero do harm."""
    counts, edges = histogram["counts"], histogram["edges"]
    low, high, most = edges[0], edges[-1], max(counts)
    span = high - low or 1.0

    def x(value: float) -> float:
        return EDGE + (value - low) / span * (WIDTH - 2 * EDGE)

    bars = []
    for count, left, right in zip(counts, edges, edges[1:], strict=False):
        tall = count / most * (HEIGHT - 2 * EDGE)
        colour = HARMS if (left + right) / 2 < 0 else HELPS
        bars.append(
            f'<rect x="{x(left):.1f}" y="{HEIGHT - EDGE - tall:.1f}" width="{max(x(right) - x(left) - 1, 1):.1f}" '
            f'height="{tall:.1f}" fill="{colour}">'
            f"<title>{_number(left)} to {_number(right)}: {count:,} rows</title></rect>"
        )
    marks = [(low, "start"), (high, "end")] + ([(0.0, "middle")] if low < 0 < high else [])
    labels = [
        f'<text x="{x(value):.1f}" y="{HEIGHT - EDGE + 16}" text-anchor="{anchor}" font-size="12">'
        f"{_number(value)}</text>"
        for value, anchor in marks
    ]
    line = f'<line x1="{EDGE}" x2="{WIDTH - EDGE}" y1="{HEIGHT - EDGE}" y2="{HEIGHT - EDGE}" stroke="#888"/>'
    top = f'<text x="{EDGE}" y="{EDGE - 10}" font-size="12">{most:,} rows</text>'
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="Histogram of values">'
        f"{''.join(bars)}{line}{top}{''.join(labels)}</svg>"
    )


def _kinds(name: str, kinds: Mapping[str, Mapping[str, float]], prices: Mapping[str, Any] | None) -> str:
    paid = prices["by_metadata"].get(name) if prices else None
    best = sorted(kinds.items(), key=lambda one: -one[1]["mean"])
    rows = []
    for kind, about in best[:SHOWN]:
        cells = [kind, f"{about['rows']:,}", _number(about["mean"]), f"{about['negative_share']:.0%}"]
        rows.append([*cells, f"{paid[kind]:,}"] if paid is not None else cells)
    head = ("", "rows", "mean value", "negative", *(("price",) if paid is not None else ()))
    return _table(head, rows)


def _ends(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    return f"<h3>{title.capitalize()}</h3>" + _table(("row", "value"), [(r["id"], _number(r["value"])) for r in rows])


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = "".join(f"<tr>{''.join(f'<td>{_text(cell)}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{_text(cell)}</th>' for cell in head)}</tr>{lines}</table>"


def _number(value: float) -> str:
    return f"{value:.3g}"


def _text(value: object) -> str:
    return html.escape(str(value))
