"""`headwater models` and `headwater datasets`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.base import (
    ApiKey,
    AsJson,
    Checkpoints,
    Filter,
    Url,
    absolute,
    app,
    checkpoint,
    fail,
    parse_json,
    print_json,
    print_table,
    service,
)

models = typer.Typer(name="models", no_args_is_help=True, rich_markup_mode="markdown", help="Models of a service.")
datasets = typer.Typer(name="datasets", no_args_is_help=True, rich_markup_mode="markdown", help="Training rows.")
app.add_typer(models)
app.add_typer(datasets)


@models.command("ls")
def list_models(url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List registered models, newest first.

    **Example**

    - `headwater models ls`
    """
    with service(url, api_key) as client:
        found = list(client.models.list())
    if as_json:
        print_json(found)
        return
    rows = [(one.name, one.path, ", ".join(c.name for c in one.checkpoints), one.dtype, one.device) for one in found]
    print_table(("name", "folder", "checkpoints", "precision", "device"), rows)


@models.command("add")
def add_model(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    path: Annotated[str, typer.Argument(help="Folder of the model, as the service sees it.")],
    checkpoints: Checkpoints = [],  # noqa: B006 Typer copies it
    gguf_file: Annotated[str | None, typer.Option(help="A GGUF file in the folder to load instead.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16.", show_default="float32")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, mps.", show_default="the service's")] = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Register a model folder, with the adapters of a run.

    **Examples**

    - `headwater models add mine models/base`

    - `headwater models add mine models/base --checkpoint early=adapters/early@0.5 --checkpoint late=adapters/late`
    """
    fields: Any = {"gguf_file": gguf_file, "dtype": dtype, "device": device}
    with service(url, api_key) as client:
        made = client.models.create(
            name, absolute(path), checkpoints=[checkpoint(one) for one in checkpoints], **fields
        )
    if as_json:
        print_json(made)
        return
    left = f", {len(made.skipped)} left out" if made.skipped else ""
    typer.echo(f"registered {made.name}: {len(made.attributed)} modules are attributed{left}")


@models.command("show")
def show_model(
    name: Annotated[str, typer.Argument(help="Its name or id.")],
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show a model: its checkpoints, what is attributed, what is left out and why.

    **Example**

    - `headwater models show mine`
    """
    with service(url, api_key) as client:
        found = client.models.get(name)
    if as_json:
        print_json(found)
        return
    typer.echo(f"{found.name} ({found.id}), {found.dtype} on {found.device}, context {found.context_length}")
    typer.echo(found.path)
    run = [(one.name, one.adapter or one.model, one.weight) for one in found.checkpoints]
    print_table(("checkpoint", "adapter", "weight"), run)
    groups = [(one.count, one.kind, f"{one.d_in} x {one.d_out}", "attributed") for one in found.attributed_groups]
    groups += [(one.count, one.kind, "", one.reason) for one in found.skipped_groups]
    print_table(("modules", "kind", "shape", ""), groups)


@datasets.command("ls")
def list_datasets(url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """List datasets, newest first.

    **Example**

    - `headwater datasets ls`
    """
    with service(url, api_key) as client:
        found = list(client.datasets.list())
    if as_json:
        print_json(found)
        return
    print_table(("name", "rows", "from"), [(one.name, one.rows, one.source) for one in found])


@datasets.command("add")
def add_dataset(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    path: Annotated[str, typer.Argument(help="A .jsonl, .json, .csv or .parquet file, or a folder of HF datasets.")],
    on_server: Annotated[
        bool, typer.Option("--on-server", help="The file lies where the service runs: name it instead of sending it.")
    ] = False,
    columns: Annotated[
        str | None, typer.Option(help='Which column holds what, as JSON: `{"prompt": "q", "response": "a"}`.')
    ] = None,
    skip_duplicates: Annotated[
        bool, typer.Option("--skip-duplicates", help="Leave rows out that came before.")
    ] = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Send a file of training rows, or name one on the server. A folder is always named: the service must see it.

    **Examples**

    - `headwater datasets add rows train.jsonl`

    - `headwater datasets add rows /srv/rows.parquet --on-server`

    - `headwater datasets add rows saved/train` (what `save_to_disk` of Hugging Face datasets wrote)
    """
    named = parse_json(columns, "--columns")
    duplicates = "skip" if skip_duplicates else None
    fields: Any = {"columns": named, "duplicates": duplicates}
    if not on_server and not Path(path).exists():
        fail(f"there is no {path!r} on this machine; is it on the server (--on-server)?")
    with service(url, api_key) as client:
        if on_server or Path(path).is_dir():
            made = client.datasets.create(name, absolute(path), **fields)
        else:
            made = client.datasets.upload(name, Path(path), **fields)
    if as_json:
        print_json(made)
        return
    skipped = f", {made.duplicates_skipped} duplicates left out" if made.duplicates_skipped else ""
    typer.echo(f"{made.name}: {made.rows:,} rows{skipped}")


@datasets.command("show")
def show_dataset(
    name: Annotated[str, typer.Argument(help="Its name or id.")],
    rows: Annotated[int, typer.Option(min=0, help="How many rows to show.")] = 5,
    filter: Filter = None,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Show a dataset and its first rows, or the first that match a filter.

    **Examples**

    - `headwater datasets show rows`

    - `headwater datasets show rows --filter '{"topic": "people"}' --rows 20`
    """
    wanted = parse_json(filter, "--filter")
    with service(url, api_key) as client:
        found = client.datasets.get(name)
        walk = client.datasets.samples(name, filter=wanted, limit=max(rows, 1))
        samples = [sample for _, sample in zip(range(rows), walk, strict=False)]
    if as_json:
        print_json({**found.model_dump(mode="json"), "samples": [one.model_dump(mode="json") for one in samples]})
        return
    typer.echo(f"{found.name} ({found.id}): {found.rows:,} rows from {found.source}")
    cells = [(one.id, _said(one.record), ", ".join(f"{k}={v}" for k, v in one.metadata.items())) for one in samples]
    print_table(("id", "row", "metadata"), cells)


def _said(record: dict[str, Any]) -> str:
    return record.get("text") or "\n".join(f"{one['role']}: {one['content']}" for one in record["messages"])
