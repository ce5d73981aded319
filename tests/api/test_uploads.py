"""What a killed process left of an upload goes at the next start, but not what somebody receives at the moment."""

import os
import time
from pathlib import Path

import pytest

from app.main import UPLOAD_S
from tests.api.conftest import Serve, quick
from tests.api.harness import must, problem, rows, serving
from tests.influence.test_arrow import save


def test_half_an_upload_is_removed_once_nobody_can_be_receiving_it(tmp_path: Path) -> None:
    settings = quick(tmp_path)
    settings.uploads_dir.mkdir()
    now = time.time()
    for name, age in (("left", UPLOAD_S + 60), ("arriving", UPLOAD_S - 60), ("new", 0)):
        upload = settings.uploads_dir / name
        upload.write_bytes(b'{"prompt": "half')
        os.utime(upload, (now - age, now - age))
    with serving(settings) as api:
        must(api.get("/readyz"))
        assert sorted(upload.name for upload in settings.uploads_dir.iterdir()) == ["arriving", "new"]


@pytest.mark.parametrize("backend", ["sqlite"], indirect=True)
def test_a_folder_of_hugging_face_datasets_is_registered_by_its_path(serve: Serve, tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", rows(3), rows(2, start=3))
    made = must(serve().post("/datasets", json={"name": "saved", "path": str(folder)}), 201)
    assert (made["rows"], made["source"]) == (5, str(folder))
    api = serve(max_body_bytes=1000)
    problem(api.post("/datasets", json={"name": "large", "path": str(folder)}), 413, "too-large", "path")
    problem(api.post("/datasets", json={"name": "none", "path": str(tmp_path)}), 422, "bad-row", "path")
    (folder / "out").symlink_to("/etc/passwd")
    problem(api.post("/datasets", json={"name": "link", "path": str(folder)}), 422, "path-not-allowed", "path")
