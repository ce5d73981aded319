"""Commands that run the service and what it is made of: serve, worker, migrate, demo, stack, settings, openapi."""

import os
import signal
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.cli.base import app, default_of, errors, fail, on_catalog, read_settings
from app.demo import Demo
from app.logs import masked
from app.processes import ProcessError, require_free_port
from app.settings import Settings
from app.tracing import TracingError

Threads = Annotated[
    int | None, typer.Option(help="Threads for torch; 0: torch decides.", show_default=default_of("threads"))
]
LogLevel = Annotated[str | None, typer.Option(help="Least severe level to log.", show_default=default_of("log_level"))]


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default=default_of("host"))] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default=default_of("port"))] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Where the database, indexes and uploads live.", show_default=default_of("data_dir")),
    ] = None,
    threads: Threads = None,
    log_level: LogLevel = None,
    end_with_stdin: Annotated[bool, typer.Option("--end-with-stdin", hidden=True)] = False,
) -> None:
    """Serve the API, with a worker in the same process.

    What is not given here comes from `HEADWATER_*` in the environment or a `.env` file: `headwater settings` lists all
    of it. The Swagger UI is at `/docs`.

    **Examples**

    - `headwater serve`

    - `headwater serve --port 9000 --data-dir /srv/headwater`
    """
    given = {"host": host, "port": port, "data_dir": data_dir, "threads": threads, "log_level": log_level}
    settings = read_settings(**{name: value for name, value in given.items() if value is not None})

    try:
        require_free_port(settings.host, settings.port)
    except ProcessError as error:
        fail(str(error))
    if end_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    if not settings.catalog_url.startswith("sqlite"):
        on_catalog(settings, lambda database: database.check())
    from app.main import create_app  # here, since it brings torch: the other commands answer at once
    from app.server import Server

    try:
        service = create_app(settings)
    except TracingError as error:
        fail(str(error))
    Server(service, settings).run()


@app.command()
def migrate(
    check: Annotated[bool, typer.Option("--check", help="Change nothing; fail unless the schema is current.")] = False,
    to: Annotated[str, typer.Option(help="Another revision: newer or older, or `base` for none.")] = "head",
) -> None:
    """Bring the database to the revision that this version needs.

    PostgreSQL is never migrated at start-up: run this once after an installation and once after each upgrade. SQLite
    needs it only to go back. An older revision drops what it does not know of: make a back-up first.

    **Examples**

    - `HEADWATER_DATABASE_URL=postgresql://headwater@db/headwater headwater migrate`

    - `headwater migrate --check` (for scripts)

    - `headwater migrate --to 0002` (before going back to an older version)
    """
    settings = read_settings()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    if check:
        on_catalog(settings, lambda database: database.check())
        typer.echo("the database is at the revision that this version needs")
        return
    before, after = on_catalog(settings, lambda database: database.migrate(to))
    typer.echo(f"the database was at revision {before or 'base'}, and is at {after or 'base'}")


@app.command()
def worker(
    data_dir: Annotated[
        Path | None,
        typer.Option(help="The folder that it shares with the API.", show_default=default_of("data_dir")),
    ] = None,
    threads: Threads = None,
    log_level: LogLevel = None,
) -> None:
    """Do the tasks of jobs, one at a time; any number of workers may run, on any number of machines.

    It takes the catalog from `HEADWATER_DATABASE_URL`, its work from `HEADWATER_QUEUE_URL` (`redis://...`), and needs
    the data folder and the models at the same paths as the API. A model stays loaded between tasks. `SIGTERM` or
    `Ctrl-C`: it ends after its step and hands back what it holds.

    **Examples**

    - `HEADWATER_QUEUE_URL=redis://localhost headwater worker`

    - `CUDA_VISIBLE_DEVICES=1 headwater worker` (one a GPU; the environment has the rest)
    """
    given = {"data_dir": data_dir, "threads": threads, "log_level": log_level}
    settings = read_settings(**{name: value for name, value in given.items() if value is not None})
    if settings.queue_url == "memory://":
        fail("a worker needs a queue that it shares with the API: set HEADWATER_QUEUE_URL=redis://host:6379")
    from app.worker import run_worker  # here, since it brings torch

    run_worker(settings, Console(highlight=False))


@app.command()
def demo(
    leave: Annotated[bool, typer.Option("--exit", help="End after the answers instead of leaving it up.")] = False,
    port: Annotated[int, typer.Option(help="Port of the demo's service.")] = 8321,
    data_dir: Annotated[Path, typer.Option(help="Where everything is kept for the next run.")] = Path(".headwater"),
    threads: Annotated[int, typer.Option(min=1, help="Threads for torch.")] = 2,
) -> None:
    """Do the whole job on a small real model, and leave the service up.

    Fetches SmolLM2-135M-Instruct (93 MB, once), starts the service, registers two checkpoints of a run and the corpus
    that they were trained on, builds the index, asks about one fact and one planted answer, and prints the training
    rows behind both. A second run finds all of it again.

    **Examples**

    - `headwater demo`

    - `headwater demo --exit` (answers, then ends: for scripts)

    - `headwater demo --port 9000 --threads 8`
    """
    try:
        Demo(data_dir=data_dir.resolve(), console=Console(highlight=False), port=port, threads=threads).run(
            stay=not leave
        )
    except ProcessError as error:
        fail(str(error))
    except KeyboardInterrupt:
        errors.print("\nStopped; everything is kept for the next run.")
        raise typer.Exit(0 if not leave else 130) from None


@app.command()
def stack(
    port: Annotated[int, typer.Option(help="Port of the API.", show_default=True)] = 8000,
    data_dir: Annotated[Path, typer.Option(help="Where data and logs lie.")] = Path(".headwater/stack"),
    workers: Annotated[int, typer.Option(min=1, help="Worker processes.")] = 2,
    threads: Annotated[int, typer.Option(min=1, help="Threads for torch in each process.")] = 1,
) -> None:
    """Run what docker-compose.yml runs, as plain processes: PostgreSQL, Redis, the migration, an API, workers.

    `HEADWATER_DATABASE_URL` and `HEADWATER_QUEUE_URL` name servers to use. Without them, those that answer on this
    machine's usual ports are used; where none does, real ones are started out of packages. Ctrl-C ends all of it.

    **Examples**

    - `headwater stack`

    - `headwater stack --workers 4 --port 9000`
    """
    from app.stack import Stack

    given = read_settings()
    external_queue = "" if given.queue_url.startswith("memory://") else given.queue_url
    try:
        Stack(
            data_dir=data_dir,
            console=Console(),
            port=port,
            workers=workers,
            threads=threads,
            database_url=given.database_url,
            queue_url=external_queue,
        ).run()
    except ProcessError as error:
        fail(str(error))
    except KeyboardInterrupt:
        errors.print("\nStopped; data and logs are kept.")
        raise typer.Exit(0) from None


@app.command("settings")
def showread_settings() -> None:
    """Print every setting: its name in the environment, its value now, what it does.

    A value that is not the default is bold. Passwords in addresses are not shown.

    **Example**

    - `HEADWATER_PORT=9000 headwater settings`
    """
    settings = read_settings()
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("variable", no_wrap=True)
    table.add_column("value", overflow="fold")
    table.add_column("what it does", overflow="fold")
    for name, field in Settings.model_fields.items():
        value = getattr(settings, name)
        style = "" if value == field.default else "bold"
        table.add_row(f"HEADWATER_{name.upper()}", Text(_plain(value), style), field.description)
    Console().print(table)


@app.command()
def openapi(
    write: Annotated[bool, typer.Option("--write", help="Write openapi/openapi.json instead of printing.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Fail when openapi/openapi.json has drifted.")] = False,
) -> None:
    """Print the OpenAPI document as served; write it, or check the copy that is checked in."""
    from app.openapi import TARGET, render

    text = render()
    if check:
        if not TARGET.exists() or TARGET.read_text(encoding="utf-8") != text:
            fail("openapi/openapi.json is not the document that is served: run `make openapi` and commit it")
        typer.echo("openapi/openapi.json is the document that is served")
    elif write:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(text, encoding="utf-8")
        typer.echo("wrote openapi/openapi.json")
    else:
        typer.echo(text, nl=False)


def _end_with_stdin() -> None:
    """Whoever started us holds the other end: not even a SIGKILL of the demo leaves its service behind."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "(none)"
    if value is None:
        return "(unset)"
    return masked(str(value)) or '""'
