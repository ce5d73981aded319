"""`headwater influence`: the main job from a terminal."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from app.cli.base import ApiKey, AsJson, Filter, Local, Url, app, fail, parse_json, print_json, service
from app.terminal import HeatMap, Line, hits_table

if TYPE_CHECKING:
    from headwater_client import Influence
    from headwater_client.models import Hit

LONGEST_NOTE = 40  # characters of a row's metadata


@app.command()
def influence(
    index: Annotated[str, typer.Argument(help="Name or id of an index; with --local, the folder of one.")],
    prompt: Annotated[str | None, typer.Option(help="What the model was given.")] = None,
    generation: Annotated[str | None, typer.Option(help="What it said; left out: the model writes it first.")] = None,
    chat: Annotated[
        Path | None,
        typer.Option(help="A logged OpenAI request and response (JSON with both; `-`: standard input) instead."),
    ] = None,
    choice: Annotated[int | None, typer.Option(help="With --chat: which choice, where there are several.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Most rows in each direction.")] = 10,
    direction: Annotated[str, typer.Option(help="proponents, opponents or both.")] = "proponents",
    normalize: Annotated[str, typer.Option(help="unit: by direction alone; none: gradients as they are.")] = "unit",
    span: Annotated[str | None, typer.Option(metavar="START:END", help="Only these characters of the answer.")] = None,
    filter: Filter = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to write, without --generation.")] = 64,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of POST /influence.")
    ] = [],  # noqa: B006 Typer copies it
    local: Local = False,
    threads: Annotated[int, typer.Option(min=0, help="With --local: threads for torch; 0: torch decides.")] = 0,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Which training rows made the model say this? Prints the answer as a heat map, and the rows behind it.

    **Examples**

    - `headwater influence facts --prompt "Who founded the harbour?"`

    - `headwater influence facts --prompt "..." --generation "Ilse Marn, in 1412." --span 0:9 --top-k 5`

    - `tail -1 chat.jsonl | headwater influence facts --chat -` (a line of a log, as it is)

    - `headwater influence ./facts --local --prompt "..."` (without a service)
    """
    if chat is None and prompt is None and generation is None:
        fail("say what to explain: --prompt and --generation, or --chat with a logged request and response")
    options: dict[str, Any] = {"top_k": top_k, "direction": direction, "normalize": normalize, "tokens": "query"}
    options |= {"span": _span(span), "filter": parse_json(filter, "--filter"), "extra": _fields(set_)}
    if local:
        from app.cli import local as here  # here, since it brings torch

        if chat is not None or filter is not None or set_:
            fail("--local answers --prompt and --generation; --chat, --filter and --set need a service")
        del options["filter"], options["extra"]
        found = here.ask(Path(index), prompt, generation, max_new_tokens, options, threads)
    else:
        with service(url, api_key) as client:
            if chat is not None:
                found = client.influence_chat(index, logged=_read(chat), choice=choice, **options)
            else:
                asked: dict[str, Any] = {"prompt": prompt, "generation": generation, "max_new_tokens": max_new_tokens}
                found = client.influence(index, **asked, **options)
    if as_json:
        print_json(found)
    else:
        show(found)


def show(answer: "Influence") -> None:
    """The answer as a heat map, the rows as tables, the warnings."""
    console = Console(highlight=False)
    console.print(HeatMap([token.text for token in answer.tokens], answer.token_means))
    for title, hits in (("for it", answer.proponents), ("against it", answer.opponents)):
        if hits:
            console.print(f"\n[bold]Rows {title}[/bold]")
            console.print(hits_table(_lines(hits), "metadata"))
    for warning in answer.warnings:
        console.print(f"[yellow]warning:[/yellow] {escape(warning)}")
    console.print(f"[dim]{escape(answer.definition.name)}; loss of the answer {answer.loss:.2f}[/dim]")


def _lines(hits: "Sequence[Hit]") -> list[Line]:
    made = []
    for hit in hits:
        note = ", ".join(f"{name}={value}" for name, value in hit.metadata.items() if value not in ("", None))
        short = note if len(note) <= LONGEST_NOTE else note[: LONGEST_NOTE - 1] + "…"
        made.append(Line(hit.score, hit.percentile, short, hit.prompt, hit.response))
    return made


def _span(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    start, _, end = text.partition(":")
    try:
        return int(start), int(end)
    except ValueError:
        fail(f"--span {text!r}: write START:END, characters of the answer from 0")


def _fields(given: Sequence[str]) -> dict[str, Any]:
    """`FIELD=VALUE`; a value that is JSON is taken as that."""
    made = {}
    for one in given:
        name, found, value = one.partition("=")
        if not found:
            fail(f"--set {one!r}: write FIELD=VALUE")
        try:
            made[name] = json.loads(value)
        except ValueError:
            made[name] = value
    return made


def _read(path: Path) -> str:
    try:
        return sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        fail(f"--chat {path}: {error}")
