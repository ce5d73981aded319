"""A scatter plot of unlearning methods as SVG: what was lost over what it took, both relative to retraining."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, LEFT, FOOT, MARGIN = 760, 420, 60, 50, 20


@dataclass(frozen=True)
class Dot:
    """One method at one seed; `gone` says whether the behaviour is."""

    name: str
    time: float
    held: float
    gone: bool


def scatter(dots: Sequence[Dot], time: float, held: float) -> str:
    """Held-out loss over the oracle's against time over retraining's; hollow where the behaviour lives.

    Args:
        time, held: the goals, whose corner is green.
    """
    furthest = max(2 * time, *(dot.time for dot in dots)) * 1.05
    top = min(4.0, max(1.2, *(dot.held for dot in dots))) * 1.05
    low = min(0.8, *(dot.held for dot in dots))

    def x(value: float) -> float:
        return LEFT + value / furthest * (WIDTH - LEFT - MARGIN)

    def y(value: float) -> float:
        return HEIGHT - FOOT - (min(value, top) - low) / (top - low) * (HEIGHT - FOOT - MARGIN)

    names = list(dict.fromkeys(dot.name for dot in dots))
    ground = HEIGHT - FOOT
    drawn = [
        f'<rect x="{LEFT}" y="{y(held):.1f}" width="{x(time) - LEFT:.1f}" height="{ground - y(held):.1f}" '
        'fill="#dff0df"/>',
        f'<path d="M{LEFT} {MARGIN}V{ground}H{WIDTH - MARGIN}M{LEFT} {y(1.0):.1f}H{WIDTH - MARGIN}" stroke="#888" '
        'fill="none"/>',
        f'<text x="{WIDTH - MARGIN}" y="{HEIGHT - 16}" text-anchor="end">seconds over retraining; green: goals</text>',
        f'<text x="8" y="14">held-out loss over the oracle (up to {top:.2f}); hollow: the trigger still works</text>',
    ]
    drawn += [
        f'<text x="{x(value):.1f}" y="{ground + 14}" text-anchor="middle">{value:.2f}</text>'
        for value in (time, furthest / 2, furthest)
    ]
    drawn += [
        f'<text x="{LEFT - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>' for value in (low, 1.0, top)
    ]
    for dot in dots:
        colour = f"hsl({names.index(dot.name) * 360 // len(names)},70%,40%)"
        at = f"{dot.name}: {dot.held:.3f} in {dot.time:.3f}"
        drawn.append(
            f'<circle cx="{x(dot.time):.1f}" cy="{y(dot.held):.1f}" r="4" stroke="{colour}" '
            f'fill="{colour if dot.gone else "none"}"><title>{at}</title></circle>'
            f'<text x="{x(dot.time) + 6:.1f}" y="{y(dot.held) + 3:.1f}" font-size="8" fill="{colour}">{dot.name}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11"><rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(drawn)}</svg>\n'
    )
