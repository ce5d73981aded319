"""`python -m app.cli.reference` writes docs/cli.md from the commands' own help; a test fails when the two drift."""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from app.cli import app
from app.cli.base import FAILED, JOB_FAILED, REFUSED, UNREACHABLE

TARGET = Path(__file__).resolve().parents[2] / "docs" / "cli.md"
HEAD = f"""# The command line

`headwater --help` lists the commands, `headwater COMMAND --help` explains one. This page is made from the same words,
by `make openapi`.

Commands that talk to a service find it by `--url` or `HEADWATER_URL` (else `http://127.0.0.1:8000`), and send the key
of `--api-key` or `HEADWATER_API_KEY`. `--json` prints the service's answer for machines; progress, warnings and errors
go to standard error. An error is one line that says what to do, and the exit code says of which kind it is: {FAILED}
the command itself failed, 2 the command line cannot be understood, {REFUSED} the service refused, {UNREACHABLE} it did
not answer, {JOB_FAILED} the job failed.
"""


def render() -> str:
    """The page."""
    return HEAD + "".join(_sections(typer.main.get_command(app), "headwater"))


def _sections(command: Any, name: str) -> Iterator[str]:
    """One section a command, in the order of the help; a group is its commands."""
    children = getattr(command, "commands", None)
    if children is not None:
        for child in sorted(children):
            yield from _sections(children[child], f"{name} {child}")
        return
    arguments = [one for one in command.params if one.param_type_name == "argument"]
    options = [one for one in command.params if one.param_type_name == "option" and not one.hidden]
    usage = " ".join([name, *(one.name.upper() if one.required else f"[{one.name.upper()}]" for one in arguments)])
    yield f"\n## `{usage}`\n\n{inspect.cleandoc(command.help or '')}\n"
    lines = [f"| `{one.name.upper()}` | {_cell(one)} |" for one in arguments]
    lines += [f"| `{', '.join(one.opts)}` | {_cell(one)} |" for one in options if one.name != "help"]
    if lines:
        yield "\n| | |\n|---|---|\n" + "\n".join(lines) + "\n"


def _cell(one: Any) -> str:
    default = one.show_default if isinstance(one.show_default, str) else one.default
    told = isinstance(default, str | int | float | Path) and not isinstance(default, bool) and default != ""
    said = (one.help or "").replace("|", "\\|")
    return said + (f" Default: {default}." if told and not one.required else "")


def main() -> None:
    """Write the page."""
    TARGET.write_text(render(), encoding="utf-8")
    typer.echo(f"wrote {TARGET.name}")


if __name__ == "__main__":
    main()
