"""The command line: `headwater serve | worker | migrate | stack | demo | value-file | keys | settings | openapi`."""

import asyncio
import json
import os
import re
import signal
import threading
from collections.abc import Awaitable, Callable, Coroutine
from datetime import datetime
from importlib.metadata import version as version_of
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from pydantic import ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.catalog.types import Scope
from app.demo import Demo
from app.logs import masked
from app.processes import ProcessError, require_free_port
from app.settings import Settings
from app.tracing import TracingError

if TYPE_CHECKING:
    from app.catalog.catalog import Catalog
    from app.catalog.database import Database

TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
Result = TypeVar("Result")
ABOUT = """Which training samples led this language model to say this?

Headwater keeps a compressed gradient of every training sample in a FAISS index, turns a generation into gradients of
its own, and answers with the samples that pushed the model towards it.

New here? `headwater demo` does the whole job on a small real model and leaves the service up to play with.
"""

app = typer.Typer(
    name="headwater",
    help=ABOUT,
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(name="keys", no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(keys)
errors = Console(stderr=True)


def _default(setting: str) -> str:
    """The default as the settings have it; the option itself is unset, so that the environment counts."""
    return str(Settings.model_fields[setting].default)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False) -> None:
    if version:
        typer.echo(f"headwater {version_of('headwater')}")
        raise typer.Exit


Threads = Annotated[
    int | None, typer.Option(help="Threads for torch; 0: torch decides.", show_default=_default("threads"))
]
LogLevel = Annotated[str | None, typer.Option(help="Least severe level to log.", show_default=_default("log_level"))]


@app.command()
def serve(
    host: Annotated[str | None, typer.Option(help="Address to listen on.", show_default=_default("host"))] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.", show_default=_default("port"))] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(help="Where the database, indexes and uploads live.", show_default=_default("data_dir")),
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
    settings = _settings(**{name: value for name, value in given.items() if value is not None})

    try:
        require_free_port(settings.host, settings.port)
    except ProcessError as error:
        _fail(str(error))
    if end_with_stdin:
        threading.Thread(target=_end_with_stdin, daemon=True).start()
    if not settings.catalog_url.startswith("sqlite"):
        _on_catalog(settings, lambda database: database.check())
    from app.main import create_app  # here, since it brings torch: the other commands answer at once
    from app.server import Server

    try:
        service = create_app(settings)
    except TracingError as error:
        _fail(str(error))
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
    settings = _settings()
    settings.data_dir.mkdir(parents=True, exist_ok=True)
    if check:
        _on_catalog(settings, lambda database: database.check())
        typer.echo("the database is at the revision that this version needs")
        return
    before, after = _on_catalog(settings, lambda database: database.migrate(to))
    typer.echo(f"the database was at revision {before or 'base'}, and is at {after or 'base'}")


@app.command()
def worker(
    data_dir: Annotated[
        Path | None,
        typer.Option(help="The folder that it shares with the API.", show_default=_default("data_dir")),
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
    settings = _settings(**{name: value for name, value in given.items() if value is not None})
    if settings.queue_url == "memory://":
        _fail("a worker needs a queue that it shares with the API: set HEADWATER_QUEUE_URL=redis://host:6379")
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
        _fail(str(error))
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

    given = _settings()
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
        _fail(str(error))
    except KeyboardInterrupt:
        errors.print("\nStopped; data and logs are kept.")
        raise typer.Exit(0) from None


@app.command("value-file")
def value_file(
    student: Annotated[Path, typer.Argument(help="Folder of an exported student: a valuation's `student/`.")],
    rows: Annotated[Path, typer.Argument(help="The rows: .jsonl, .ndjson, .json, .csv or .parquet.")],
    out: Annotated[Path, typer.Option(help="Where scores go: .csv, .jsonl or .parquet.")] = Path("scores.csv"),
    columns: Annotated[
        str, typer.Option(help='Which column holds what, as JSON: `{"prompt": "q", "response": "a"}`.')
    ] = "",
    threads: Annotated[int, typer.Option(min=0, help="Threads for torch; 0: torch decides.")] = 0,
) -> None:
    """Score the rows of a file with a student that a buyer exported: offline, on the side of whoever owns the rows.

    The scores carry the rows' stable ids and numbers, and no text. Neither the buyer's model nor a service is needed.

    **Examples**

    - `headwater value-file student/ rows.jsonl`

    - `headwater value-file student/ rows.parquet --out scores.parquet`
    """
    from app.influence.corpus import Columns  # here, since the rest brings torch
    from app.influence.errors import HeadwaterError
    from app.valuation.offline import is_trusted, score_file
    from app.valuation.student import load_student

    try:
        named = Columns(**json.loads(columns)) if columns else None
    except (ValueError, TypeError) as error:
        _fail(f"--columns is an object of prompt, input, response, messages or text, and column names: {error}")
    if threads:
        import torch

        torch.set_num_threads(threads)
    try:
        loaded = load_student(student)
        done = list(score_file(loaded, rows, out, named))[-1]
    except HeadwaterError as error:
        _fail(error.detail)
    except OSError as error:
        _fail(str(error))
    typer.echo(f"wrote the scores of {done:,} rows to {out}")
    if not is_trusted(student):
        said = "[bold]warning:[/bold] its report says that this student's order is too poor to trust"
        errors.print(said, soft_wrap=True)


@keys.callback()
def _keys() -> None:
    """API keys: make, list and revoke them.

    They live in the catalog that `HEADWATER_DATABASE_URL` or `HEADWATER_DATA_DIR` names: run this where the service
    runs, with the same settings.
    """


@keys.command("create")
def create_key(
    tenant: Annotated[str, typer.Argument(help="Whom the key is for; the keys of a tenant share its quota.")],
    scope: Annotated[
        list[Scope],
        typer.Option(help="What it may do; may be given several times. `write` includes `read`, `admin` everything."),
    ] = [Scope.READ, Scope.QUERY],  # noqa: B006 Typer copies it
    note: Annotated[str, typer.Option(help="What it is for, to tell it from others in the list.")] = "",
) -> None:
    """Make a key and print it: once, since only a hash of it is kept.

    The key alone goes to standard output, so that a script can take it.

    **Examples**

    - `headwater keys create team-a`

    - `headwater keys create team-a --scope write --scope query --note "nightly build"`
    """
    if not TENANT.fullmatch(tenant):
        _fail(f"{tenant!r} cannot be a tenant: letters, digits, `.`, `_` and `-`, at most 100")
    key, text = _in_catalog(lambda catalog: catalog.api_keys.create(tenant, scope, note))
    typer.echo(text)
    about = f"{key.id} of {tenant!r} may: {', '.join(key.scopes)}. The key is shown this once: keep it safe."
    errors.print(about, markup=False, soft_wrap=True)


@keys.command("list")
def list_keys() -> None:
    """List every key: whose it is, what it may do, when it was last used. Not the keys themselves.

    **Example**

    - `headwater keys list`
    """
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in ("id", "tenant", "quota a minute", "may", "note", "made (UTC)", "last used", "state"):
        table.add_column(column, no_wrap=column == "id", overflow="fold")
    for key in _in_catalog(lambda catalog: catalog.api_keys.all()):
        state = f"revoked {_moment(key.revoked_at)}" if key.revoked_at else "in force"
        used = _moment(key.last_used_at) if key.last_used_at else "never"
        limits = ((key.tenant.requests_per_minute, "requests"), (key.tenant.tokens_per_minute, "tokens"))
        quota = ", ".join(f"{limit:,} {kind}" for limit, kind in limits if limit) or "as set"
        may, made = ", ".join(key.scopes), _moment(key.created_at)
        cells = (key.id, key.tenant_name, quota, may, key.note, made, used, state)
        table.add_row(*map(Text, cells), style="dim" if key.revoked_at else "")
    Console().print(table)


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(metavar="ID", help="The key's id, as the list has it.")]) -> None:
    """Revoke a key: the service refuses it from its next request on.

    **Example**

    - `headwater keys revoke key_0657f2b1c3d4e5a1b2c3d4e5`
    """
    key = _in_catalog(lambda catalog: catalog.api_keys.revoke(key_id))
    typer.echo(f"revoked {key.id} of {key.tenant_name!r}")


@keys.command("quota")
def set_quota(
    tenant: Annotated[str, typer.Argument(help="Whose quota.")],
    requests: Annotated[int | None, typer.Option(min=1, help="Requests a minute.", show_default="the setting")] = None,
    tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of influence queries a minute.", show_default="the setting")
    ] = None,
) -> None:
    """Set what the keys of a tenant may spend together; what is left out is again as the settings have it.

    **Example**

    - `headwater keys quota team-a --requests 600 --tokens 100000`
    """
    _in_catalog(lambda catalog: catalog.api_keys.set_quota(tenant, requests, tokens))
    limits = ((requests, "requests"), (tokens, "tokens"))
    said = [f"{limit:,} {kind}" if limit else f"{kind} as the settings have it" for limit, kind in limits]
    typer.echo(f"{tenant} may spend a minute: {', '.join(said)}")


@app.command("settings")
def show_settings() -> None:
    """Print every setting: its name in the environment, its value now, what it does.

    A value that is not the default is bold. Passwords in addresses are not shown.

    **Example**

    - `HEADWATER_PORT=9000 headwater settings`
    """
    settings = _settings()
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
            _fail("openapi/openapi.json is not the document that is served: run `make openapi` and commit it")
        typer.echo("openapi/openapi.json is the document that is served")
    elif write:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(text, encoding="utf-8")
        typer.echo("wrote openapi/openapi.json")
    else:
        typer.echo(text, nl=False)


def _in_catalog(do: Callable[["Catalog"], Awaitable[Result]]) -> Result:
    """Do something in the catalog and keep it."""
    settings = _settings()
    settings.data_dir.mkdir(parents=True, exist_ok=True)

    async def do_and_keep(database: "Database") -> Result:
        if database.embedded:
            await database.migrate()
        else:
            await database.check()
        async with database.catalog() as catalog:
            result = await do(catalog)
            await catalog.commit()
            return result

    return _on_catalog(settings, do_and_keep)


def _on_catalog(settings: Settings, work: Callable[["Database"], Coroutine[Any, Any, Result]]) -> Result:
    """Do something with the database alone, and say on one line why it cannot be done."""
    from sqlalchemy.exc import OperationalError, SQLAlchemyError  # here, as in serve: the help answers at once

    from app.catalog.database import Database
    from app.catalog.errors import CatalogError, Unavailable

    async def open_and_work() -> Result:
        database = Database(settings.catalog_url, **settings.database_pool)
        try:
            return await work(database)
        except (OperationalError, Unavailable):
            await asyncio.sleep(0.1)  # after a connection that failed, aiosqlite's thread speaks to this loop once more
            raise
        finally:
            await database.close()

    try:
        return asyncio.run(open_and_work())
    except Unavailable as error:
        _fail(f"the catalog at {masked(settings.catalog_url)} cannot be used: {masked(error.detail)}")
    except CatalogError as error:
        _fail(error.detail)
    except SQLAlchemyError as error:
        why = str(getattr(error, "orig", error)).partition("\n")[0]
        _fail(f"the catalog at {masked(settings.catalog_url)} cannot be used: {masked(why)}")


def _moment(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M}"


def _end_with_stdin() -> None:
    """Whoever started us holds the other end: not even a SIGKILL of the demo leaves its service behind."""
    while os.read(0, 1024):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _settings(**given: Any) -> Settings:
    try:
        return Settings(**given)
    except ValidationError as error:
        lines = [f"HEADWATER_{str(one['loc'][0]).upper()}: {one['msg']}" for one in error.errors() if one["loc"]]
        _fail("\n".join(lines) or str(error))


def _plain(value: object) -> str:
    if isinstance(value, tuple):
        return ", ".join(map(str, value)) or "(none)"
    if value is None:
        return "(unset)"
    return masked(str(value)) or '""'


def _fail(message: str) -> NoReturn:
    errors.print("[bold red]error:[/bold red]", end=" ")
    errors.print(message, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(1)


def main() -> None:
    """Entry point of the `headwater` script."""
    app()


if __name__ == "__main__":
    main()
