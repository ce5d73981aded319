"""`--local`: an index is built and asked in this process, by the library alone.

Beside the index lie the model's place and the rows, so that the folder is all that a question needs.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers.utils import logging

from app.cli.base import errors, fail
from app.influence.building import Progress
from app.influence.building import build as build_index
from app.influence.corpus import Message, Row, read_rows, row_from_json
from app.influence.errors import HeadwaterError
from app.influence.index import IndexSpec, open_index
from app.influence.models import Checkpoint, LoadedModel, ModelSpec, load
from app.influence.projection import ProjectionSpec
from app.influence.retrieval import Answer, Hit, Options, Query, influence
from app.jobs.specs import model_from_json, model_to_json
from app.terminal import JobBars
from headwater_client import Influence

if TYPE_CHECKING:
    from headwater_client.fields import CheckpointFields

MODEL, ROWS = "model.json", "rows.jsonl"


@contextmanager
def quietly() -> Iterator[None]:
    """Whatever the library refuses ends the command with one line; no bar but ours is shown."""
    logging.disable_progress_bar()
    try:
        yield
    except HeadwaterError as error:
        fail(error.detail)
    except OSError as error:
        fail(str(error))


def build(
    folder: Path,
    model: Path,
    checkpoints: Sequence["CheckpointFields"],
    dataset: Path,
    heldout: str | None,
    projection: Mapping[str, Any],
    fields: Mapping[str, Any],
    threads: int,
) -> dict[str, Any]:
    """Build an index in a folder, or take up a build that was stopped there; what the manifest says of it."""
    if threads:
        torch.set_num_threads(threads)
    run = tuple(
        Checkpoint(one["name"], Path(one.get("adapter") or ""), weight=one.get("weight", 1.0)) for one in checkpoints
    )
    with quietly():
        rows = _unique(read_rows(dataset))
        held = _unique(read_rows(Path(heldout))) if heldout else []
        spec = ModelSpec(model.resolve(), checkpoints=run)
        given = {name: value for name, value in fields.items() if value is not None}
        index_spec = IndexSpec(projection=ProjectionSpec(**projection), **given)
        loaded = load(spec)
        folder.mkdir(parents=True, exist_ok=True)
        with JobBars(errors) as bars:
            for step in build_index(folder, loaded, rows, index_spec, held):
                bars.show(_told(step), "running")
        (folder / MODEL).write_text(json.dumps(model_to_json(spec)), encoding="utf-8")
        records = ({"record": row.to_json(), "metadata": dict(row.metadata)} for row in rows)
        lines = "".join(json.dumps(one, ensure_ascii=False, default=str) + "\n" for one in records)
        (folder / ROWS).write_text(lines, encoding="utf-8")
        built = open_index(folder)
    return {"folder": str(folder), "rows": built.rows, "warnings": built.manifest.warnings}


def _unique(rows: Iterator[Row]) -> list[Row]:
    return list({row.id: row for row in rows}.values())


def _told(step: Progress) -> dict[str, Any]:
    counted = {"done": step.rows, "total": step.total_rows, "unit": "rows"}
    return {"stage": step.stage, **counted, "rate": None, "eta_s": None}


def ask(
    folder: Path, prompt: str | None, generation: str | None, new_tokens: int, options: dict[str, Any], threads: int
) -> Influence:
    """The answer, as a service would give it."""
    if threads:
        torch.set_num_threads(threads)
    if not (folder / MODEL).is_file():
        fail(f"{folder} is no index of `headwater index build --local`")
    with quietly():
        model = load(model_from_json(json.loads((folder / MODEL).read_text(encoding="utf-8"))))
        index = open_index(folder)
        rows = {row.id: row for row in _kept(folder)}
        messages = (Message("user", prompt),) if prompt else ()
        said = (
            generation if generation is not None else _written(model, messages, new_tokens, index.manifest.index_spec)
        )
        query = Query(messages, said, options.pop("span"))
        answer = influence(model, index, [query], Options(**options), rows.__getitem__)[0]
    return _shown(folder, said, generation is None, answer, rows.__getitem__)


def _written(model: LoadedModel, messages: tuple[Message, ...], new_tokens: int, spec: IndexSpec) -> str:
    said = model.generate(messages, new_tokens, spec.template)
    if not said.strip():
        fail("the model wrote nothing for this prompt: give --generation")
    return said


def _kept(folder: Path) -> Iterator[Row]:
    with (folder / ROWS).open(encoding="utf-8") as lines:
        for line in lines:
            one = json.loads(line)
            yield row_from_json(one["record"], one["metadata"])


def _shown(folder: Path, generation: str, generated: bool, answer: Answer, row_of: Callable[[str], Row]) -> Influence:
    def hits(found: Sequence[Hit]) -> list[dict[str, Any]]:
        rows = [(hit, row_of(hit.id)) for hit in found]
        return [
            {**asdict(hit), "prompt": row.prompt, "response": row.response, "metadata": dict(row.metadata)}
            for hit, row in rows
        ]

    return Influence.model_validate(
        {
            "index": str(folder),
            "generation": generation,
            "generated": generated,
            "loss": answer.loss,
            "tokens": [asdict(token) for token in answer.tokens],
            "proponents": hits(answer.proponents),
            "opponents": hits(answer.opponents),
            "definition": asdict(answer.definition),
            "warnings": answer.warnings,
            "timings": answer.timings,
        }
    )
