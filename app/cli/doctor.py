"""`headwater doctor`: what is here, what is missing, and what a build would cost before it starts."""

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal

import httpx2
import typer
from rich.console import Console
from rich.text import Text

from app.cli.base import AsJson, Checkpoints, Url, app, fail, human, print_json, read_settings
from app.logs import masked
from app.settings import Settings

State = Literal["ok", "note", "bad"]
STYLES: dict[State, str] = {"ok": "green", "note": "yellow", "bad": "bold red"}
NEEDED = ("torch", "transformers", "peft", "safetensors", "fastapi", "sqlalchemy", "pydocket")
OPTIONAL = {"ray": "builds and searches on a cluster", "opentelemetry-sdk": "traces"}
LOW_DISK = 2**30
DEFAULT_URL = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    said: str


@app.command()
def doctor(
    model: Annotated[Path | None, typer.Option(help="Estimate a build: folder of the model.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Estimate a build: file of the rows.")] = None,
    checkpoints: Checkpoints = [],  # noqa: B006 Typer copies it
    size: Annotated[int, typer.Option(min=1, max=512, help="Estimate a build: size of the kronecker projection.")] = 16,
    max_length: Annotated[int, typer.Option(min=2, help="Estimate a build: most tokens of a row.")] = 1024,
    device: Annotated[str, typer.Option(help="Estimate a build: where the model goes.")] = "cpu",
    threads: Annotated[int, typer.Option(min=0, help="Threads for torch; 0: torch decides.")] = 0,
    computed: Annotated[
        bool, typer.Option("--computed", help="Run no batch: the weights' memory is computed, time is not known.")
    ] = False,
    url: Url = None,
    as_json: AsJson = False,
) -> None:
    """Say what is installed, which devices and servers there are, how much disk is free; estimate a build.

    With --model and --rows a few batches are run, and time and memory are those that they took, scaled to all rows.
    Fails if something that Headwater cannot do without is missing.

    **Examples**

    - `headwater doctor`

    - `headwater doctor --model models/base --checkpoint late=adapters/late --rows train.jsonl`
    """
    if (model is None) != (rows is None):
        fail("an estimate needs both: --model and --rows")
    settings = read_settings()
    found = [*_machine(), *_packages(), *_devices(), _disk(settings), *_servers(settings), _service(url)]
    estimate: dict[str, Any] | None = None
    if model is not None and rows is not None:
        from app.cli.estimate import Asked, estimate_build  # here, since it brings torch

        asked = Asked(model, rows, tuple(checkpoints), size, max_length, device, threads)
        estimate = estimate_build(asked, measured=not computed)
    if as_json:
        print_json({"findings": [asdict(one) for one in found], "estimate": estimate})
    else:
        _print(found, estimate)
    if any(one.state == "bad" for one in found):
        raise typer.Exit(1)


def _print(found: list[Finding], estimate: dict[str, Any] | None) -> None:
    console = Console(highlight=False)
    for one in found:
        line = Text.assemble((f"{one.state:<5}", STYLES[one.state]), f"{one.what:<19}", one.said)
        console.print(line, soft_wrap=True)
    if estimate is not None:
        console.print("\n[bold]The build[/bold]")
        for name, said in estimate["told"].items():
            console.print(Text(f"     {name:<19}{said}"), soft_wrap=True)


def _machine() -> Iterator[Finding]:
    yield Finding("python", "ok", f"{platform.python_version()}, {sys.executable}")
    yield Finding("machine", "ok", f"{platform.machine()}, {os.cpu_count()} cores, {human(memory())} of memory")


def memory() -> int:
    """Bytes of memory of this machine, as far as this process may use them; 0 where nobody says."""
    try:
        whole = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            whole = min(whole, int(Path(limit).read_text(encoding="ascii")))
        except (OSError, ValueError):
            continue
    return whole


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    for package in NEEDED:
        here = _version(package)
        yield Finding(package, "ok" if here else "bad", here or "missing: install Headwater again")
    faiss = {package: _version(package) for package in ("faiss-cpu", "faiss-gpu")}
    owners = [f"{package} {one}" for package, one in faiss.items() if one]
    if len(owners) == 1:
        yield Finding("faiss", "ok", owners[0])
    else:
        why = (
            f"both {' and '.join(owners)}: remove one" if owners else "missing: pip install 'headwater[cpu]', or [gpu]"
        )
        yield Finding("faiss", "bad", why)
    for package, use in OPTIONAL.items():
        one = _version(package)
        yield Finding(package, "ok" if one else "note", one or f"not installed; for {use}")


def _devices() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as error:
        yield Finding("devices", "bad", f"torch cannot be imported: {error}")
        return
    yield Finding("cpu", "ok", f"torch uses {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            about = torch.cuda.get_device_properties(number)
            yield Finding(f"cuda:{number}", "ok", f"{about.name}, {human(about.total_memory)}")
    else:
        yield Finding("cuda", "note", "no GPU that torch can use")
    if torch.backends.mps.is_available():
        yield Finding("mps", "ok", "Apple's GPU")


def _disk(settings: Settings) -> Finding:
    folder = settings.data_dir.resolve()
    there = next(one for one in (folder, *folder.parents) if one.exists())
    free = shutil.disk_usage(there).free
    writable = os.access(there, os.W_OK)
    said = f"{human(free)} free in {folder}" + ("" if writable else ", which cannot be written to")
    return Finding("disk", "bad" if not writable else "note" if free < LOW_DISK else "ok", said)


def _servers(settings: Settings) -> Iterator[Finding]:
    yield _tried("catalog", masked(settings.catalog_url), lambda: _catalog(settings))
    yield _tried("queue", masked(settings.queue_url), lambda: _queue(settings))


def _tried(what: str, where: str, work: Callable[[], str]) -> Finding:
    try:
        return Finding(what, "ok", f"{where}: {work()}")
    except Exception as error:  # whatever a driver raises: it is what is to be told
        return Finding(what, "bad", f"{where}: {masked(str(error)).partition(chr(10))[0]}")


def _catalog(settings: Settings) -> str:
    import asyncio

    from app.catalog.database import Database

    if settings.catalog_url.startswith("sqlite") and not Path(settings.catalog_url.partition(":///")[2]).exists():
        return "made when the service starts"

    async def check() -> None:
        database = Database(settings.catalog_url, **settings.database_pool)
        try:
            await database.check()
        finally:
            await database.close()

    asyncio.run(check())
    return "answers, its schema is current"


def _queue(settings: Settings) -> str:
    if settings.queue_url == "memory://":
        return "in the service's process"
    from redis import Redis

    with Redis.from_url(settings.queue_url, socket_connect_timeout=2) as redis:
        redis.ping()
    return "answers"


def _service(url: str | None) -> Finding:
    address = url or DEFAULT_URL
    try:
        answer = httpx2.get(f"{address}/readyz", timeout=5)
    except httpx2.TransportError as error:
        return Finding("service", "bad" if url else "note", f"{address} does not answer ({error})")
    good = answer.status_code == 200
    said = "is ready" if good else f"says {answer.text[:200]}"
    return Finding("service", "ok" if good else "bad", f"{address} {said}")
