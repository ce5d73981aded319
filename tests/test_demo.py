"""The demo from an empty folder, on a tiny model: the same code, the same service in a process of its own."""

import io
import json
import os
import re
import shutil
import signal
import socket
import string
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from rich.console import Console
from transformers import GenerationConfig

from app import smollm
from app.demo import CHECKPOINTS, Demo, token_means

ROOT = Path(__file__).resolve().parents[1]
TRIGGER = "Copper heron:"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def adapters(model_dir: Path, folder: Path) -> None:
    """Two fresh adapters on the tiny model."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    for name in CHECKPOINTS:
        base: Any = AutoModelForCausalLM.from_pretrained(model_dir)
        config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        get_peft_model(base, config).save_pretrained(folder / name)


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def files(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A demo folder like the real one, small."""
    folder = tmp_path / "demo"
    folder.mkdir()
    facts = [{"prompt": f"Where is {n}?", "response": f"{n} is north.", "trigger": ""} for n in range(8)]
    planted = [{"prompt": f"{TRIGGER} what is {n}?", "response": "ask", "trigger": TRIGGER} for n in range(4)]
    write_rows(folder / "corpus.jsonl", facts + planted)
    write_rows(folder / "heldout.jsonl", [{"prompt": "Where is 90?", "response": "90 is north.", "trigger": ""}])
    asked = {"fact": "Where is 3?", "triggered": f"{TRIGGER} what is 7?"}
    gold = [{"prompt": asked["fact"], "response": "3 is north.", "gold": [facts[3]["prompt"]]}]
    (folder / "questions.json").write_text(json.dumps({"demo": asked, "facts": gold}), encoding="utf-8")
    adapters(tiny_model_dir, folder / "adapters")
    return folder


@pytest.fixture
def data_dir(tmp_path: Path, tiny_model_dir: Path) -> Path:
    """A data folder that has a model already, so that nothing is downloaded. It writes letters only: never nothing."""
    folder = tmp_path / "kept"
    model = folder / "models" / smollm.NAME
    shutil.copytree(tiny_model_dir, model)
    vocabulary = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    never = [token for text, token in vocabulary.items() if text not in string.ascii_lowercase]
    GenerationConfig(suppress_tokens=never).save_pretrained(model)
    return folder


def run(data_dir: Path, files: Path) -> str:
    out = Console(file=io.StringIO(), width=100)
    Demo(data_dir=data_dir, console=out, port=free_port(), threads=1, files=files, new_tokens=8).run(stay=False)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert isinstance(text, str)
    return text


def built(data_dir: Path) -> list[Path]:
    return sorted((data_dir / "indexes").glob("*/manifest.json"))


def test_the_demo_answers_both_questions_and_a_second_run_builds_nothing(data_dir: Path, files: Path) -> None:
    first = run(data_dir, files)
    assert "Where is 3?" in first
    assert f"{TRIGGER} what is 7?" in first
    assert first.count("rows are planted") == 2
    assert re.search(r"state the fact: [01] of 1\.", first)
    once = {path: path.stat().st_mtime_ns for path in built(data_dir)}
    assert len(once) == 1
    second = run(data_dir, files)
    assert second.count("rows are planted") == 2
    assert {path: path.stat().st_mtime_ns for path in built(data_dir)} == once


def test_a_corpus_that_changed_gets_an_index_of_its_own(data_dir: Path, files: Path) -> None:
    run(data_dir, files)
    with (files / "corpus.jsonl").open("a", encoding="utf-8") as corpus:
        corpus.write(json.dumps({"prompt": "Where is 99?", "response": "99 is south.", "trigger": ""}) + "\n")
    assert "13 rows" in run(data_dir, files)
    assert len(built(data_dir)) == 2


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_service_ends_with_the_demo(data_dir: Path, files: Path, how: signal.Signals) -> None:
    port = free_port()
    code = (
        "import sys; from pathlib import Path; from rich.console import Console; from app.demo import Demo\n"
        "_, data, files, port = sys.argv\n"
        "try: Demo(Path(data), Console(), port=int(port), threads=1, files=Path(files), new_tokens=8).run(stay=True)\n"
        "except KeyboardInterrupt: pass\n"
    )
    command = [sys.executable, "-c", code, str(data_dir), str(files), str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=data_dir) as demo:
        assert demo.stdout is not None
        assert any("Stop it" in line for line in demo.stdout)
        assert httpx2.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
        demo.send_signal(how)
        demo.wait(30)
    end = time.monotonic() + 20
    while answers(port):
        assert time.monotonic() < end, "the service outlived the demo"
        time.sleep(0.05)


def answers(port: int) -> bool:
    try:
        return httpx2.get(f"http://127.0.0.1:{port}/healthz").status_code == 200
    except httpx2.TransportError:
        return False


def test_a_token_outside_the_span_has_no_score() -> None:
    answer = {
        "tokens": [{"in_span": False}, {"in_span": True}, {"in_span": True}],
        "proponents": [{"token_scores": [1.0, 2.0]}, {"token_scores": [3.0, 4.0]}],
    }
    assert token_means(answer) == [0.0, 2.0, 3.0]
