"""Two kinds of plot as inline SVG: lines over steps, bars with intervals. Colours are the page's classes."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 620, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 8, 30, 34
"""Margins: numbers, nothing, the legend, names."""
TICKS = 5


@dataclass(frozen=True)
class Bar:
    """A value with the ends of its interval; `of` is the class, and the legend's name, of its state."""

    of: str
    value: float
    low: float
    high: float


def lines(title: str, series: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Values over steps, a line a name; the names are classes of the page."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    axis = _Axis([y for _, y in points])
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    wide = (WIDTH - LEFT - RIGHT) / max(1.0, last - first)
    drawn = [axis.drawn]
    for name, line in series.items():
        path = " ".join(f"{LEFT + (x - first) * wide:.1f},{axis.at(y):.1f}" for x, y in line)
        drawn.append(f'<polyline class="line {name}" points="{path}"/>')
    for x, anchor in ((first, "start"), (last, "end")):
        at = f'x="{LEFT + (x - first) * wide:.1f}" y="{HEIGHT - BOTTOM + 18}"'
        drawn.append(f'<text {at} text-anchor="{anchor}">step {x:g}</text>')
    return _figure(title, list(series), drawn)


def bars(title: str, groups: Mapping[str, Sequence[Bar]]) -> str:
    """Bars side by side, by group, each with its interval."""
    every = [bar for group in groups.values() for bar in group]
    if not every:
        return ""
    axis = _Axis([0.0, *(bar.low for bar in every), *(bar.high for bar in every)])
    drawn = [axis.drawn]
    slot = (WIDTH - LEFT - RIGHT) / len(groups)
    for number, (name, group) in enumerate(groups.items()):
        middle = LEFT + (number + 0.5) * slot
        wide = min(34.0, 0.8 * slot / max(1, len(group)))
        for place, bar in enumerate(group):
            x = middle + (place - len(group) / 2) * wide
            top, foot = sorted((axis.at(bar.value), axis.at(0.0)))
            told = f"{name}, {bar.of}: {bar.value:.3g} [{bar.low:.3g}, {bar.high:.3g}]"
            drawn.append(
                f'<rect class="bar {bar.of}" x="{x + 1:.1f}" y="{top:.1f}" width="{wide - 2:.1f}" '
                f'height="{foot - top:.1f}"><title>{html.escape(told)}</title></rect>'
            )
            at = x + wide / 2
            drawn.append(
                f'<path class="ends" d="M{at:.1f} {axis.at(bar.low):.1f}V{axis.at(bar.high):.1f}'
                f'M{at - 4:.1f} {axis.at(bar.low):.1f}h8M{at - 4:.1f} {axis.at(bar.high):.1f}h8"/>'
            )
        drawn.append(
            f'<text x="{middle:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{html.escape(name)}</text>'
        )
    return _figure(title, list(dict.fromkeys(bar.of for bar in every)), drawn)


class _Axis:
    """The vertical one, with round numbers; `drawn` is its lines and numbers."""

    def __init__(self, values: Sequence[float]) -> None:
        low, high = min(values), max(values)
        rough = (high - low or abs(high) or 1.0) / TICKS
        size = 10.0 ** math.floor(math.log10(rough))
        step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
        self.low, self.high = math.floor(low / step) * step, math.ceil(high / step) * step
        if self.high == self.low:
            self.high = self.low + step
        ticks = [self.low + n * step for n in range(round((self.high - self.low) / step) + 1)]
        self.drawn = "".join(
            f'<path class="grid" d="M{LEFT} {self.at(tick):.1f}H{WIDTH - RIGHT}"/>'
            f'<text x="{LEFT - 6}" y="{self.at(tick) + 4:.1f}" text-anchor="end">{round(tick, 10):g}</text>'
            for tick in ticks
        )

    def at(self, value: float) -> float:
        """The height of a value, from the top."""
        share = (value - self.low) / (self.high - self.low)
        return HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)


def _figure(title: str, names: Sequence[str], drawn: Sequence[str]) -> str:
    legend = "".join(
        f'<rect class="bar {name}" x="{LEFT + 110 * number}" y="6" width="12" height="12"/>'
        f'<text x="{LEFT + 110 * number + 18}" y="16">{html.escape(name)}</text>'
        for number, name in enumerate(names)
    )
    return (
        f"<figure><figcaption>{html.escape(title)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(title)}">'
        f"{legend}{''.join(drawn)}</svg></figure>"
    )
