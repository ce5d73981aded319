"""`headwater keys`: API keys, in the catalog itself."""

import re
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.catalog.types import Scope
from app.cli.base import Result, app, errors, fail, on_catalog, read_settings

if TYPE_CHECKING:
    from app.catalog.catalog import Catalog
    from app.catalog.database import Database

TENANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
keys = typer.Typer(name="keys", no_args_is_help=True, rich_markup_mode="markdown")
app.add_typer(keys)


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
        fail(f"{tenant!r} cannot be a tenant: letters, digits, `.`, `_` and `-`, at most 100")
    key, text = in_catalog(lambda catalog: catalog.api_keys.create(tenant, scope, note))
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
    for key in in_catalog(lambda catalog: catalog.api_keys.all()):
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
    key = in_catalog(lambda catalog: catalog.api_keys.revoke(key_id))
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
    in_catalog(lambda catalog: catalog.api_keys.set_quota(tenant, requests, tokens))
    limits = ((requests, "requests"), (tokens, "tokens"))
    said = [f"{limit:,} {kind}" if limit else f"{kind} as the settings have it" for limit, kind in limits]
    typer.echo(f"{tenant} may spend a minute: {', '.join(said)}")


def in_catalog(do: Callable[["Catalog"], Awaitable[Result]]) -> Result:
    """Do something in the catalog and keep it."""
    settings = read_settings()
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

    return on_catalog(settings, do_and_keep)


def _moment(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M}"
