"""What an unlearning job is to do, frozen when it is submitted: a file in the job's folder.

Rows are kept with their texts and the model with its hashes, so that a job that is taken up again is the same job
whatever became of datasets and files meanwhile. The job's row in the catalog holds the file's hash.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.influence.errors import SpecError, disk_full_is_named
from app.influence.index import write_file

FILE = "request.json"


@dataclass(frozen=True)
class UnlearnPlan:
    """A job's model, rows and settings, as JSON values.

    Attributes:
        model: as `specs.model_to_json` writes it.
        fingerprint: of the model when it was registered.
        training: method, seed and parameters of the training.
        rows: canonical records by group: forget, retain, heldout, seen, unseen.
        clean: by the id of a forget row, what the model should have said.
    """

    model: dict[str, Any]
    fingerprint: Mapping[str, str]
    training: dict[str, Any]
    mapping: str
    relearn_steps: int
    report_rows: int
    rows: Mapping[str, Sequence[str]]
    clean: Mapping[str, str]

    def write(self, folder: Path) -> str:
        """Keep it in the job's folder; gives its hash."""
        content = json.dumps(asdict(self), ensure_ascii=False, indent=1).encode()
        with disk_full_is_named("the job's request"):
            folder.mkdir(parents=True, exist_ok=True)
            write_file(folder / FILE, content)
        return hashlib.sha256(content).hexdigest()


def read_plan(folder: Path, digest: str) -> UnlearnPlan:
    """The plan that `write` kept.

    Raises:
        SpecError: it is not there, or not what was written.
    """
    file = folder / FILE
    content = file.read_bytes() if file.is_file() else b""
    if hashlib.sha256(content).hexdigest() != digest:
        raise SpecError(f"{FILE} of this job is missing or was changed: submit the request again", field=FILE)
    return UnlearnPlan(**json.loads(content))
