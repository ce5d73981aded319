"""Answers for eyes: HTML for notebooks, bars, data frames. Whatever a row or a model wrote is escaped."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from headwater_client.errors import PackageMissing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame

    from headwater_client.models import Hit

WARM, COLD = "255,140,50", "110,160,230"
LONGEST_LABEL = 50  # characters beside a bar
TABLE = "border-collapse:collapse;margin-top:.5em"
CELL = "text-align:left;vertical-align:top;padding:.2em .6em;border-top:1px solid rgba(128,128,128,.3)"


def heat_map(tokens: Sequence[str], scores: Sequence[float]) -> str:
    """Tokens as spans from cold (against) to warm (for); the number is in the title, so that colour says nothing alone.

    A line break in a token is kept as one.
    """
    most = max((abs(score) for score in scores), default=0.0) or 1.0
    spans = []
    for token, score in zip(tokens, scores, strict=True):
        colour = WARM if score > 0 else COLD
        style = f"background:rgba({colour},{abs(score) / most:.2f})"
        spans.append(f'<span style="{style}" title="{score:+.4g}">{escape(token)}</span>')
    return f'<div style="white-space:pre-wrap;font-family:monospace">{"".join(spans)}</div>'


def influence_html(
    tokens: Sequence[str],
    means: Sequence[float],
    proponents: "Sequence[Hit]",
    opponents: "Sequence[Hit]",
    warnings: Sequence[str],
) -> str:
    """The generation as a heat map, the rows behind it as tables, the warnings."""
    parts = [heat_map(tokens, means)]
    parts += [_table(title, hits) for title, hits in (("for it", proponents), ("against it", opponents)) if hits]
    parts += [f"<p><b>warning:</b> {escape(warning)}</p>" for warning in warnings]
    return "<div>" + "".join(parts) + "</div>"


def _table(title: str, hits: "Sequence[Hit]") -> str:
    head = "".join(f'<th style="{CELL}">{name}</th>' for name in ("#", "score", "percentile", f"rows {title}", "also"))
    return f'<table style="{TABLE}"><tr>{head}</tr>{"".join(_row(*one) for one in enumerate(hits, start=1))}</table>'


def _row(rank: int, hit: "Hit") -> str:
    said = escape(hit.response)
    if hit.train_tokens:
        said = heat_map([token.text for token in hit.train_tokens], [token.score for token in hit.train_tokens])
    about = ", ".join(f"{escape(str(name))}: {escape(str(value))}" for name, value in hit.metadata.items())
    text = f"<b>{escape(hit.prompt)}</b><br>{said}"
    cells = (str(rank), f"{hit.score:+.3f}", f"{hit.percentile:.1f}", text, f"{about}<br><code>{escape(hit.id)}</code>")
    return "<tr>" + "".join(f'<td style="{CELL}">{cell}</td>' for cell in cells) + "</tr>"


def frame(records: Iterable[dict[str, Any]]) -> "DataFrame":
    """The records as a data frame."""
    try:
        import pandas
    except ImportError as error:
        raise PackageMissing("to_pandas() needs pandas: pip install 'headwater-client[pandas]'") from error
    return pandas.DataFrame(list(records))


def bars(values: Sequence[tuple[str, float]], name: str, ax: "Axes | None") -> "Axes":
    """Horizontal bars, the first on top."""
    try:
        from matplotlib import pyplot
    except ImportError as error:
        raise PackageMissing("plot() needs matplotlib: pip install 'headwater-client[plot]'") from error
    if ax is None:
        _, ax = pyplot.subplots(figsize=(8, 1 + 0.3 * len(values)), layout="constrained")
    labels = [text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "…" for text, _ in values]
    colours = ["#d9661f" if value > 0 else "#3f6fb5" for _, value in values]
    ax.barh(range(len(values)), [value for _, value in values], color=colours)
    # a dollar sign would be read as a formula
    ax.set_yticks(range(len(values)), [label.replace("\n", " ").replace("$", r"\$") for label in labels])
    ax.invert_yaxis()
    ax.set_xlabel(name)
    return ax
