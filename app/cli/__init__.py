"""The command line.

Commands that run a service are in `serving`, `keys` and `offline`; those that talk to one, through the SDK, in the
others. `base` has what they share.
"""

from importlib.metadata import version as version_of
from typing import Annotated

import typer

from app.cli import asking, assets, doctor, indexes, keys, offline, serving, work
from app.cli.base import app

__all__ = ["app", "main"]
PARTS = (serving, asking, indexes, assets, work, doctor, keys, offline)
"""Each adds its commands to the application when it is imported."""


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False) -> None:
    if version:
        typer.echo(f"headwater {version_of('headwater')}")
        raise typer.Exit


def main() -> None:
    """Entry point of the `headwater` script."""
    app()
