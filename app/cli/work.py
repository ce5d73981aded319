"""`headwater unlearn`, `headwater value` and `headwater jobs`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from app.cli.base import (
    ApiKey,
    AsJson,
    Filter,
    NoWait,
    Url,
    app,
    fail,
    follow,
    parse_json,
    print_json,
    print_table,
    say,
    service,
)

jobs = typer.Typer(name="jobs", no_args_is_help=True, rich_markup_mode="markdown", help="Long work of a service.")
app.add_typer(jobs)
Out = Annotated[Path | None, typer.Option(help="Fetch what the job made into this folder.")]


@app.command()
def unlearn(
    index: Annotated[str, typer.Argument(help="Name or id of an index; its model unlearns.")],
    ids: Annotated[list[str], typer.Option("--id", help="A row to forget; may be given often.")] = [],  # noqa: B006
    filter: Filter = None,
    prompt: Annotated[str | None, typer.Option(help="Forget the rows behind the answer to this.")] = None,
    generation: Annotated[str | None, typer.Option(help="Beside --prompt: the answer.")] = None,
    top_k: Annotated[int, typer.Option(min=1, help="With --prompt: most rows.")] = 10,
    clean: Annotated[str | None, typer.Option(help="Metadata column that holds what should have been said.")] = None,
    method: Annotated[
        str | None, typer.Option(help="See docs/unlearning.md.", show_default="the best measured")
    ] = None,
    heldout: Annotated[str | None, typer.Option(help="Dataset for the report that was not trained on.")] = None,
    register_as: Annotated[str | None, typer.Option(help="What to call the new model.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be forgotten, and how long it takes.")
    ] = False,
    out: Out = None,
    no_wait: NoWait = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Make a model forget rows: by id, by metadata, or those behind an answer. Look first, with --dry-run.

    **Examples**

    - `headwater unlearn facts --filter '{"source": "forum"}' --dry-run`

    - `headwater unlearn facts --id 3f9a0c11e23f9a0c --register-as mine-clean`

    - `headwater unlearn facts --prompt "Who founded the harbour?" --top-k 5 --out made/`
    """
    asked = {"prompt": prompt, "generation": generation, "top_k": top_k}
    by_answer = {key: value for key, value in asked.items() if value is not None} if prompt or generation else None
    ways = {"ids": ids or None, "filter": parse_json(filter, "--filter"), "influence": by_answer}
    forget: Any = {way: value for way, value in ways.items() if value is not None}
    if not forget:
        fail("say what to forget: --id, --filter or --prompt")
    fields: Any = {"clean": clean, "method": method, "heldout": heldout, "register_as": register_as}
    with service(url, api_key) as client:
        if dry_run:
            preview = client.preview_unlearn(forget, index=index, **fields)
            if as_json:
                print_json(preview)
                return
            rows = [(row.id, row.why, row.prompt, row.response) for row in preview.forget.rows]
            print_table(("forgets", "found by", "prompt", "response"), rows)
            took = "unknown" if preview.estimate.seconds is None else f"{preview.estimate.seconds:.0f} s"
            typer.echo(f"{preview.forget.count} rows to forget, {preview.retain.count} to hold; time: {took}")
            typer.echo(f"  ({preview.estimate.how})")
            return
        job = client.unlearn(forget, index=index, **fields)
        if no_wait:
            say(as_json, job.accepted, job.id)
            return
        follow(job)
        if out is not None:
            job.download(out)
        made = job.result()
    where = f"; what it made is in {out}" if out else f"; fetch what it made: headwater jobs fetch {job.id}"
    say(as_json, made, f"forgot {job.accepted.forget} rows{where}")


@app.command()
def value(
    model: Annotated[str, typer.Argument(help="Name or id of the model.")],
    candidates: Annotated[str, typer.Argument(help="Dataset whose rows are valued.")],
    validation: Annotated[str, typer.Argument(help="Dataset whose loss training is to lower.")],
    method: Annotated[str | None, typer.Option(help="linfik or alinfik.", show_default="linfik")] = None,
    group_by: Annotated[str | None, typer.Option(help="Metadata column of the validation rows.")] = None,
    index: Annotated[str | None, typer.Option(help="An index of the candidates, to take values from.")] = None,
    budget: Annotated[int | None, typer.Option(help="What is paid for all rows, in whole units.")] = None,
    out: Out = None,
    no_wait: NoWait = False,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """Find which rows of a candidate set are worth training on.

    **Examples**

    - `headwater value mine candidates validation`

    - `headwater value mine candidates validation --method alinfik --out values/`
    """
    fields: Any = {"method": method, "group_by": group_by, "index": index, "budget": budget}
    with service(url, api_key) as client:
        job = client.valuations.create(model, candidates, validation, **fields)
        if no_wait:
            say(as_json, job.accepted, job.id)
            return
        follow(job)
        if out is not None:
            job.download(out)
        found = job.result()
    if as_json:
        print_json(found)
        return
    assert found.summary is not None, "the job succeeded"
    for title, rows in (("best", found.summary.top), ("worst", found.summary.bottom)):
        cells = [(f"{row.value:+.5f}", row.id, row.prompt or "", row.response or "") for row in rows]
        print_table((f"the {title}", "id", "prompt", "response"), cells)
    harmful = found.summary.negative_share
    told = "" if harmful is None else f", {harmful:.0%} of them do harm"
    typer.echo(f"{found.summary.rows:,} rows{told}; valuation {found.id}")
    for warning in found.summary.warnings:
        typer.echo(f"warning: {warning}")


@jobs.command("ls")
def list_jobs(
    state: Annotated[
        str | None, typer.Option(help="queued, running, succeeded, failed or cancelled.", show_default="any")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the newest first.")] = 20,
    url: Url = None,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """List jobs, newest first.

    **Examples**

    - `headwater jobs ls`

    - `headwater jobs ls --state running`
    """
    with service(url, api_key) as client:
        found = [job for _, job in zip(range(limit), client.jobs.list(state=state, limit=limit), strict=False)]
    if as_json:
        print_json(found)
        return
    rows = []
    for job in found:
        done = f"{job.progress.stage} {job.progress.done}/{job.progress.total}" if job.progress else ""
        why = job.error.detail if job.error else done
        rows.append((job.id, job.kind, job.state, f"{job.created_at:%Y-%m-%d %H:%M}", why))
    print_table(("id", "kind", "state", "submitted (UTC)", ""), rows)


JobId = Annotated[str, typer.Argument(metavar="JOB", help="The job's id.")]


@jobs.command("watch")
def watch_job(job: JobId, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Show a job until it ends; --json prints each change on a line. Fails if the job does.

    **Example**

    - `headwater jobs watch job_0194b2c5f3a1e23f9a0c11`
    """
    with service(url, api_key) as client:
        found = client.jobs.get(job)
        if as_json:
            for info in found.events():
                typer.echo(info.model_dump_json())
            found.wait()
            return
        follow(found)
    typer.echo(f"{found.id} {found.state}")


@jobs.command("cancel")
def cancel_job(job: JobId, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Cancel a job: at once if it waits, after its step if it runs. What it had finished is kept for a retry.

    **Example**

    - `headwater jobs cancel job_0194b2c5f3a1e23f9a0c11`
    """
    with service(url, api_key) as client:
        found = client.jobs.get(job).cancel()
    say(as_json, found.info, f"{found.id} {found.state}")


@jobs.command("retry")
def retry_job(job: JobId, url: Url = None, api_key: ApiKey = None, as_json: AsJson = False) -> None:
    """Run a failed or cancelled job again, from where it stopped.

    **Example**

    - `headwater jobs retry job_0194b2c5f3a1e23f9a0c11`
    """
    with service(url, api_key) as client:
        found = client.jobs.get(job).retry()
    say(as_json, found.info, f"{found.id} {found.state}")


@jobs.command("fetch")
def fetch(
    job: JobId,
    out: Annotated[Path, typer.Option(help="Folder for the files.", show_default="the job's id")] = Path(),
    url: Url = None,
    api_key: ApiKey = None,
) -> None:
    """Fetch the files that a job made.

    **Example**

    - `headwater jobs fetch job_0194b2c5f3a1e23f9a0c11 --out made/`
    """
    with service(url, api_key) as client:
        for path in client.jobs.get(job).download(out if out != Path() else Path(job)):
            typer.echo(str(path))
