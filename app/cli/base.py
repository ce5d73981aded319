"""What the commands share: the application, how a command fails, settings, the catalog, a service to talk to."""

import asyncio
import json
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.logs import masked
from app.settings import Settings
from app.terminal import JobBars

if TYPE_CHECKING:
    from app.catalog.database import Database
    from headwater_client import Client, Job, JobInfo
    from headwater_client.fields import CheckpointFields

Result = TypeVar("Result")
FAILED, REFUSED, UNREACHABLE, JOB_FAILED = 1, 3, 4, 5
"""Exit codes; 2 is a command line that cannot be understood."""
RETRIES = 2  # somebody sits there and waits
PATIENCE_S = 300.0  # while a job is followed
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
errors = Console(stderr=True)

Url = Annotated[
    str | None,
    typer.Option("--url", envvar="HEADWATER_URL", help="Where the service is.", show_default="http://127.0.0.1:8000"),
]
ApiKey = Annotated[
    str | None, typer.Option("--api-key", envvar="HEADWATER_API_KEY", help="An API key, where one is needed.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for machines.")]
Checkpoints = Annotated[
    list[str],
    typer.Option("--checkpoint", metavar="NAME=FOLDER[@WEIGHT]", help="An adapter of the run; may be given often."),
]
Local = Annotated[bool, typer.Option("--local", help="In this process, without a service.")]
Filter = Annotated[str | None, typer.Option(help='Only rows with such metadata, as JSON: `{"topic": "people"}`.')]
NoWait = Annotated[bool, typer.Option("--no-wait", help="Print the job and end; it goes on.")]


def default_of(setting: str) -> str:
    """The default as the settings have it; the option itself is unset, so that the environment counts."""
    return str(Settings.model_fields[setting].default)


@contextmanager
def service(url: str | None, api_key: str | None) -> Iterator["Client"]:
    """A client of the service; whatever goes wrong with it ends the command with one line and an exit code."""
    from headwater_client import Client, HeadwaterError, JobFailed, Problem  # here: the help answers at once
    from headwater_client.errors import ConnectionFailed

    with Client(url, api_key, retries=RETRIES) as client:
        try:
            yield client
        except Problem as error:
            fail(error.detail + ("" if error.request_id is None else f" (request {error.request_id})"), REFUSED)
        except ConnectionFailed as error:
            fail(f"{error}: start one with `headwater serve`, or name it with --url", UNREACHABLE)
        except JobFailed as error:
            fail(f"{error}; `headwater jobs retry {error.job}` takes it up where it stopped", JOB_FAILED)
        except HeadwaterError as error:
            fail(str(error))
        except KeyboardInterrupt:
            errors.print("\nStopped; a job that was begun goes on: `headwater jobs ls`.")
            raise typer.Exit(130) from None


def follow(job: "Job[Any, Result]") -> None:
    """Show a job on standard error until it has succeeded; a service that restarts meanwhile is waited for."""
    from headwater_client.errors import ConnectionFailed

    answered = time.monotonic()
    with JobBars(errors) as bars:

        def show(info: "JobInfo") -> None:
            nonlocal answered
            answered = time.monotonic()
            bars.show(info.progress.model_dump() if info.progress else None, info.state)

        while True:
            try:
                job.wait(progress=show)
            except ConnectionFailed:
                if time.monotonic() - answered > PATIENCE_S:
                    raise
            else:
                return


def print_json(value: Any) -> None:
    """An answer, or a list of them."""
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        value = [one.model_dump(mode="json") if isinstance(one, BaseModel) else one for one in value]
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False))


def say(as_json: bool, value: Any, text: str) -> None:
    """The answer for machines, or one line for people."""
    if as_json:
        print_json(value)
    else:
        typer.echo(text)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table for people; what is in it is no markup."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    Console().print(table)


def parse_json(text: str | None, option: str) -> Any:
    """The value of an option that is JSON."""
    try:
        return None if text is None else json.loads(text)
    except ValueError as error:
        fail(f"{option} is not JSON: {error}")


def absolute(path: str) -> str:
    """A path of this machine as the service can find it, if it runs here; another one as it is."""
    return str(Path(path).resolve()) if Path(path).exists() else path


def checkpoint(text: str) -> "CheckpointFields":
    """`NAME=FOLDER` or `NAME=FOLDER@WEIGHT`."""
    name, found, rest = text.partition("=")
    folder, weighted, weight = rest.rpartition("@")
    if not found or not rest:
        fail(f"--checkpoint {text!r}: write NAME=FOLDER, or NAME=FOLDER@WEIGHT")
    if not weighted:
        return {"name": name, "adapter": absolute(rest)}
    try:
        return {"name": name, "adapter": absolute(folder), "weight": float(weight)}
    except ValueError:
        fail(f"--checkpoint {text!r}: {weight!r} is no weight")


def human(size: float) -> str:
    """Bytes in words."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"


def on_catalog(settings: Settings, work: Callable[["Database"], Coroutine[Any, Any, Result]]) -> Result:
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
        fail(f"the catalog at {masked(settings.catalog_url)} cannot be used: {masked(error.detail)}")
    except CatalogError as error:
        fail(error.detail)
    except SQLAlchemyError as error:
        why = str(getattr(error, "orig", error)).partition("\n")[0]
        fail(f"the catalog at {masked(settings.catalog_url)} cannot be used: {masked(why)}")


def read_settings(**given: Any) -> Settings:
    """The settings, with those of the command line; a wrong one is named."""
    try:
        return Settings(**given)
    except ValidationError as error:
        lines = [f"HEADWATER_{str(one['loc'][0]).upper()}: {one['msg']}" for one in error.errors() if one["loc"]]
        fail("\n".join(lines) or str(error))


def fail(message: str, code: int = FAILED) -> NoReturn:
    """End the command with one line on standard error."""
    errors.print("[bold red]error:[/bold red]", end=" ")
    errors.print(message, highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(code)
