"""`headwater index`: build, add, rm, ls, show."""

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.base import (
    ApiKey,
    AsJson,
    Checkpoints,
    Local,
    NoWait,
    Url,
    app,
    checkpoint,
    errors,
    fail,
    follow,
    print_json,
    print_table,
    say,
    service,
)

index = typer.Typer(name="index", no_args_is_help=True, rich_markup_mode="markdown", help="Indexes over training rows.")
app.add_typer(index)


@index.command("build")
def build_index(
    name: Annotated[str, typer.Argument(help="What to call it; with --local, the folder to build it in.")],
    model: Annotated[str, typer.Option(help="Name of a registered model; with --local, a model folder.")],
    dataset: Annotated[str, typer.Option(help="Name of a dataset; with --local, a file of rows.")],
    heldout: Annotated[str | None, typer.Option(help="Rows that the model was not trained on, to measure by.")] = None,
    projection: Annotated[
        str | None, typer.Option(help="kronecker, global, rapidgrad.", show_default="kronecker")
    ] = None,
    size: Annotated[int | None, typer.Option(help="Of the projection.", show_default="16, for kronecker")] = None,
    normalisation: Annotated[str | None, typer.Option(help="layer or none.", show_default="layer")] = None,
    template: Annotated[str | None, typer.Option(help="auto, chat, alpaca, plain.", show_default="auto")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens of a row.", show_default="1024")] = None,
    no_wait: NoWait = False,
    local: Local = False,
    checkpoints: Checkpoints = [],  # noqa: B006 Typer copies it
    threads: Annotated[int, typer.Option(min=0, help="With --local: threads for torch; 0: torch decides.")] = 0,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Build an index of a model over a dataset, and wait for it; `headwater doctor --model --rows` says how long.

    **Examples**

    - `headwater index build facts --model mine --dataset rows --heldout rows-heldout`

    - `headwater index build facts --model mine --dataset rows --no-wait`

    - `headwater index build ./facts --local --model models/base --checkpoint late=adapters/late --dataset train.jsonl`
    """
    projected = {key: value for key, value in (("kind", projection), ("size", size)) if value is not None}
    fields: dict[str, Any] = {"normalisation": normalisation, "template": template, "max_length": max_length}
    if local:
        from app.cli import local as here  # here, since it brings torch

        adapters = [checkpoint(one) for one in checkpoints]
        made = here.build(Path(name), Path(model), adapters, Path(dataset), heldout, projected, fields, threads)
        say(as_json, made, f"{name}: {made['rows']:,} rows; ask it with `headwater influence {name} --local`")
        return
    if checkpoints:
        fail("--checkpoint goes with --local: a registered model has its checkpoints (headwater models add)")
    with service(url, api_key) as client:
        given: Any = {"heldout": heldout, "projection": projected or None, **fields}
        job = client.indexes.build(name, model, dataset, **given)
        if no_wait:
            say(as_json, job.accepted, job.id)
            return
        follow(job)
        found = job.result()
    for warning in (found.manifest or {}).get("warnings", []):
        errors.print(f"warning: {warning}", markup=False, style="yellow")
    say(as_json, found, f"{found.name}: {found.rows:,} rows, {found.state}")


@index.command("add")
def add_rows(
    name: Annotated[str, typer.Argument(help="Name or id of the index.")],
    dataset: Annotated[str, typer.Argument(help="Name of the dataset whose rows are added.")],
    no_wait: NoWait = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Add the rows of a dataset to an index; until it is done the index answers as before.

    **Example**

    - `headwater index add facts rows-2`
    """
    with service(url, api_key) as client:
        job = client.indexes.add(name, dataset=dataset)
        if no_wait:
            say(as_json, job.accepted, job.id)
            return
        follow(job)
        found = job.result()
    say(as_json, found, f"{found.name}: {found.rows:,} rows")


@index.command("rm")
def remove(
    name: Annotated[str, typer.Argument(help="Name or id of the index.")],
    ids: Annotated[list[str] | None, typer.Argument(help="Rows to remove; none: the whole index.")] = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask before a whole index is deleted.")] = False,
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Remove rows from an index by their ids, or delete the index.

    **Examples**

    - `headwater index rm facts 3f9a0c11e23f9a0c`

    - `headwater index rm facts --yes` (all of it)
    """
    if not ids and not yes:
        typer.confirm(f"Delete the index {name} and its files?", abort=True)
    with service(url, api_key) as client:
        if ids:
            done = client.indexes.remove(name, ids)
            typer.echo(f"removed {done.removed}; {name} has {done.rows:,} rows")
        else:
            client.indexes.delete(name)
            typer.echo(f"deleted {name}")


@index.command("ls")
def list_indexes(url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List indexes, newest first.

    **Example**

    - `headwater index ls`
    """
    with service(url, api_key) as client:
        found = list(client.indexes.list())
    if as_json:
        print_json(found)
        return
    rows = [(one.name, one.state, f"{one.rows:,}", one.model, one.dataset) for one in found]
    print_table(("name", "state", "rows", "model", "dataset"), rows)


@index.command("show")
def show_index(
    name: Annotated[str, typer.Argument(help="Name or id of the index.")],
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show an index: how it was built, what it holds, what to keep in mind.

    **Example**

    - `headwater index show facts`
    """
    with service(url, api_key) as client:
        found = client.indexes.get(name)
    if as_json:
        print_json(found)
        return
    typer.echo(f"{found.name} ({found.id}), {found.state}: {found.rows:,} rows of {found.dataset} under {found.model}")
    manifest = found.manifest or {}
    checkpoints = [(one["name"], one["weight"]) for one in manifest.get("checkpoints", [])]
    print_table(("setting", "value"), [(key, value) for key, value in found.spec.items()])
    print_table(("checkpoint", "weight"), checkpoints)
    for warning in manifest.get("warnings", []):
        typer.echo(f"warning: {warning}")
    if found.damage:
        typer.echo(f"damaged: {found.damage}")
