"""A line chart as an SVG file, so that a benchmark needs no plotting library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 760, 420, 60, 200, 40, 50
COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b", "#17becf", "#7f7f7f", "#bcbd22")
Line = Sequence[tuple[float, float]]


def line_chart(file: Path, title: str, across: str, up: str, lines: Mapping[str, Line]) -> None:
    """Write one chart; `lines` are points (x, y) by name, drawn in the order given."""
    xs, ys = ([point[side] for line in lines.values() for point in line] for side in (0, 1))
    low, high = min(0.0, *ys), max(ys) * 1.05 or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        over = LEFT + (x - min(xs)) / ((max(xs) - min(xs)) or 1) * (WIDTH - LEFT - RIGHT)
        return over, HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" '
        'font-size="12"><rect width="100%" height="100%" fill="white"/>',
        _text(LEFT, TOP - 16, title, size=14),
        _text(LEFT + 120, HEIGHT - 12, across),
        _text(8, TOP - 16, up),
    ]
    for tick in range(5):
        value = low + (high - low) * tick / 4
        x, y = place(min(xs), value)
        parts += [f'<line x1="{x}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>']
        parts += [_text(x - 40, y + 4, f"{value:.2f}")]
    for x in sorted(set(xs)):
        parts += [_text(place(x, low)[0] - 8, HEIGHT - BOTTOM + 16, f"{x:g}")]
    for number, (name, line) in enumerate(lines.items()):
        colour = COLOURS[number % len(COLOURS)]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in line))
        parts += [f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>']
        parts += [_text(WIDTH - RIGHT + 10, TOP + 18 * number, name, colour)]
    file.write_text("\n".join([*parts, "</svg>"]), encoding="utf-8")


def _text(x: float, y: float, words: str, colour: str = "#333", size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}">{escape(words)}</text>'
