"""What a killed process left of an upload goes at the next start, but not what somebody receives at the moment."""

import os
import time
from pathlib import Path

from app.main import UPLOAD_S
from tests.api.conftest import quick
from tests.api.harness import must, serving


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
