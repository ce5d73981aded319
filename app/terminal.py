"""Answers in a terminal: a heat map over the generation's tokens, a table of training rows, a job's progress.

Nothing is said by colour alone: under each token stands a bar, and under a terminal that has no block characters a
digit, so that a log file or a colour-blind reader sees the same.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from rich.cells import cell_len
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.style import Style
from rich.table import Table
from rich.text import Text

BARS = "▁▂▃▄▅▆▇█"
DIGITS = "12345678"
COLD, NEUTRAL, WARM = (110, 160, 230), (235, 235, 235), (255, 140, 50)
EVERY_S = 10.0  # between lines, where there is no terminal
FAINT = 0.04
"""Below this share of the largest score a token is left plain."""


@dataclass(frozen=True)
class HeatMap:
    """Tokens on a scale from cold (against) over plain to warm (for), each with its bar underneath."""

    tokens: Sequence[str]
    scores: Sequence[float]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lines of tokens, each followed by its line of bars."""
        marks = DIGITS if options.ascii_only else BARS
        most = max((abs(score) for score in self.scores), default=0.0) or 1.0
        words, bars = Text(no_wrap=True), Text(no_wrap=True, style="dim")
        for token, score in zip(self.tokens, self.scores, strict=True):
            for shown, ends_line in _pieces(token):
                width = cell_len(shown)
                if words.cell_len + width > options.max_width and words.cell_len:
                    yield from (words, bars)
                    words, bars = Text(no_wrap=True), Text(no_wrap=True, style="dim")
                words.append(shown, _style(score / most))
                bars.append(_bar(score / most, marks) * width)
                if ends_line:
                    yield from (words, bars)
                    words, bars = Text(no_wrap=True), Text(no_wrap=True, style="dim")
        if words.cell_len:
            yield from (words, bars)


def _pieces(token: str) -> Iterator[tuple[str, bool]]:
    """The token's lines, and whether a line ends behind each."""
    lines = token.replace("\t", "    ").split("\n")
    for place, line in enumerate(lines):
        ends_line = place < len(lines) - 1
        if line or ends_line:
            yield line, ends_line


def _bar(share: float, marks: str) -> str:
    if abs(share) < FAINT:
        return " "
    return "-" if share < 0 else marks[min(int(share * len(marks)), len(marks) - 1)]


def _style(share: float) -> Style:
    if abs(share) < FAINT:
        return Style.null()
    end = WARM if share > 0 else COLD
    red, green, blue = (round(n + (e - n) * min(abs(share), 1.0)) for n, e in zip(NEUTRAL, end, strict=True))
    return Style(color="black", bgcolor=Color.from_rgb(red, green, blue))


@dataclass(frozen=True)
class Line:
    """One training row of an answer."""

    score: float
    percentile: float
    note: str
    prompt: str
    response: str
    marked: bool = False


def hits_table(lines: Sequence[Line], note: str) -> Table:
    """Ranked training rows; `note` heads the column that says what is known about each."""
    table = Table(box=None, padding=(0, 1), expand=True, header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("score", justify="right", no_wrap=True)
    table.add_column("percentile", justify="right", no_wrap=True)
    table.add_column(note, no_wrap=True)
    table.add_column("training row: prompt, response", ratio=1, overflow="fold")
    for rank, line in enumerate(lines, start=1):
        style = "bold red" if line.marked else ""
        table.add_row(
            str(rank),
            f"{line.score:+.3f}",
            f"{line.percentile:.1f}",
            Text(line.note, style=style),
            f"{escape(line.prompt)}\n[dim]{escape(line.response)}[/dim]",
        )
    return table


class Meter(ProgressColumn):
    """Rate and time left as the service reports them, so that a resumed job is not measured from its middle."""

    def render(self, task: Task) -> Text:
        """`7.4 rows/s, 0:15 left`."""
        return Text(pace(task.fields.get("rate"), task.fields.get("eta_s"), task.fields.get("unit", "rows")))


def job_progress(console: Console) -> Progress:
    """A bar for a job."""
    bar = BarColumn(bar_width=30)
    return Progress(TextColumn("{task.description:<10}"), bar, MofNCompleteColumn(), Meter(), console=console)


class JobBars:
    """A job as it goes: a bar a stage in a terminal, a line now and then elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars = job_progress(console)
        self._stage, self._task, self._said = "", TaskID(0), time.monotonic()

    def __enter__(self) -> Self:
        """Show bars for as long as the block lasts."""
        self._bars.start()
        return self

    def __exit__(self, *_raised: object) -> None:
        """Leave them as they are."""
        self._bars.stop()

    def show(self, now: Mapping[str, Any] | None, state: str) -> None:
        """The job's progress, as the service has it, and its state."""
        if state == "succeeded":
            for one in self._bars.tasks:
                self._bars.update(one.id, completed=one.total, rate=None, eta_s=None)
            return
        if now is None:
            return
        if now["stage"] != self._stage:
            self._stage, self._task = now["stage"], self._bars.add_task(now["stage"], total=now["total"])
        self._bars.update(self._task, completed=now["done"], **{key: now[key] for key in ("rate", "eta_s", "unit")})
        if not self._console.is_terminal and time.monotonic() - self._said > EVERY_S:
            self._said = time.monotonic()
            rest = pace(now["rate"], now["eta_s"], now["unit"])
            self._console.print(f"  {self._stage} {now['done']}/{now['total']} {now['unit']} {rest}")


def pace(rate: float | None, eta_s: float | None, unit: str) -> str:
    """Rate and time left in words; empty while they are unknown."""
    parts = [f"{rate:.1f} {unit}/s"] if rate else []
    if eta_s is not None:
        parts.append(f"{int(eta_s) // 60}:{int(eta_s) % 60:02d} left")
    return ", ".join(parts)
