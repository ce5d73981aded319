"""`headwater value-file`: a provider scores rows with a student, without a service."""

import json
from pathlib import Path
from typing import Annotated

import typer

from app.cli.base import app, errors, fail


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
        fail(f"--columns is an object of prompt, input, response, messages or text, and column names: {error}")
    if threads:
        import torch

        torch.set_num_threads(threads)
    try:
        loaded = load_student(student)
        done = list(score_file(loaded, rows, out, named))[-1]
    except HeadwaterError as error:
        fail(error.detail)
    except OSError as error:
        fail(str(error))
    typer.echo(f"wrote the scores of {done:,} rows to {out}")
    if not is_trusted(student):
        said = "[bold]warning:[/bold] its report says that this student's order is too poor to trust"
        errors.print(said, soft_wrap=True)
