"""What the terminal shows must be readable without its colours."""

import io

import pytest
from rich.console import Console

from app.terminal import HeatMap, Line, hits_table, pace


def shown(what: object, width: int = 60, encoding: str = "utf-8", *, colour: bool = False) -> str:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding=encoding)
    console = Console(file=file, width=width, force_terminal=colour, color_system="truecolor" if colour else None)
    console.print(what)
    file.flush()
    return raw.getvalue().decode(encoding)


def test_a_token_is_told_apart_by_its_bar_when_there_is_no_colour() -> None:
    tokens, bars = shown(HeatMap(["ask", " the", " clerk"], [1.0, 0.0, -0.5])).splitlines()
    assert tokens.rstrip() == "ask the clerk"
    assert bars.rstrip() == "███    ------"


def test_a_terminal_without_block_characters_gets_digits() -> None:
    _, bars = shown(HeatMap(["ask", " the"], [1.0, 0.5]), encoding="ascii").splitlines()
    assert bars.rstrip() == "8885555"


def test_the_colour_of_a_token_is_in_its_background() -> None:
    assert "48;2;255;140;50" in shown(HeatMap(["ask"], [2.0]), colour=True)


def test_a_long_generation_keeps_each_bar_under_its_token() -> None:
    lines = shown(HeatMap([f"word{n} " for n in range(9)], [1.0] * 9), width=20).splitlines()
    assert len(lines) % 2 == 0
    for tokens, bars in zip(lines[::2], lines[1::2], strict=True):
        assert len(tokens.rstrip()) <= len(bars.rstrip()) <= 20


def test_a_new_line_in_the_generation_is_a_new_line() -> None:
    assert [line.rstrip() for line in shown(HeatMap(["a", "\n", "b"], [1.0, 0.0, 1.0])).splitlines()] == [
        "a",
        "█",
        "b",
        "█",
    ]


def test_scores_that_are_all_zero_are_shown_plain() -> None:
    assert "█" not in shown(HeatMap(["a", "b"], [0.0, 0.0]))


def test_a_row_that_looks_like_markup_is_shown_as_it_is() -> None:
    line = Line(score=0.5, percentile=99.0, note="poisoned", prompt="[bold]x[/bold]", response="[/]", marked=True)
    table = shown(hits_table([line], "known as"), width=100)
    assert "[bold]x[/bold]" in table
    assert "[/]" in table


@pytest.mark.parametrize(
    ("rate", "eta_s", "words"), [(7.44, 75.0, "7.4 rows/s, 1:15 left"), (None, None, ""), (2.0, None, "2.0 rows/s")]
)
def test_pace_says_only_what_is_known(rate: float | None, eta_s: float | None, words: str) -> None:
    assert pace(rate, eta_s, "rows") == words
