"""The callback of Hugging Face's Trainer, in real runs of a tiny model."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, LlamaForCausalLM, Trainer, TrainingArguments

from headwater_client import Client
from headwater_client.integrations.trainer import HeadwaterCallback, _spread
from tests.api.harness import Api, jsonl, rows

NAMES = iter(f"run-{number}" for number in range(100))


@pytest.fixture
def output(service: Api) -> Iterator[Path]:
    """A folder that the service may read."""
    folder = service.app.state.services.settings.data_dir / next(NAMES)
    folder.mkdir()
    return folder


def train(model: Any, model_dir: Path, output: Path, callback: HeadwaterCallback, **more: Any) -> None:
    """Four steps."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    texts = [tokenizer.apply_chat_template(turns(row), tokenize=False) for row in rows(4)]
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"][:64] for text in texts]
    examples = [{"input_ids": torch.tensor(ids), "labels": torch.tensor(ids)} for ids in encoded]
    arguments = TrainingArguments(
        output_dir=str(output),
        per_device_train_batch_size=1,
        max_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        **more,
    )
    Trainer(model, arguments, train_dataset=examples, processing_class=tokenizer, callbacks=[callback]).train()  # type: ignore[arg-type]


def turns(row: dict[str, Any]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["response"]}]


def test_the_adapters_of_a_run_are_registered_and_indexed(client: Client, tiny_model_dir: Path, output: Path) -> None:
    base = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    callback = HeadwaterCallback(output.name, rows(4), index=output.name, client=client, most=2)
    train(model, tiny_model_dir, output, callback, save_strategy="steps", save_steps=1)
    assert callback.model
    assert [one.name for one in callback.model.checkpoints] == ["checkpoint-2", "checkpoint-4"]
    assert callback.model.path == str(tiny_model_dir.resolve())
    assert callback.dataset
    assert callback.dataset.rows == 4
    assert callback.job
    assert callback.job.result(timeout=120).rows == 4
    answer = client.influence(output.name, prompt="What colour?", generation="red", tokens="none")
    assert len(answer.definition.checkpoints) == 2


def test_a_run_that_saved_nothing_is_saved_at_its_end(client: Client, tiny_model_dir: Path, output: Path) -> None:
    (output / "rows.jsonl").write_bytes(jsonl(rows(3)))
    callback = HeadwaterCallback(output.name, output / "rows.jsonl", client=client)
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    train(model, tiny_model_dir, output, callback, save_strategy="no")
    assert callback.model
    assert [(one.name, one.model) for one in callback.model.checkpoints] == [("final", str(output / "final"))]
    assert callback.job is None


def test_a_service_that_is_away_costs_the_run_nothing(
    tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    with Client("http://127.0.0.1:9", retries=0) as nobody, caplog.at_level(logging.WARNING):
        callback = HeadwaterCallback("lost", rows(2), client=nobody)
        train(model, tiny_model_dir, tmp_path, callback, save_strategy="no")
    assert "do it by hand" in caplog.text
    assert (tmp_path / "final" / "model.safetensors").is_file()


@pytest.mark.parametrize(("many", "most", "chosen"), [(10, 4, [1, 4, 6, 9]), (2, 4, [0, 1]), (5, 1, [4]), (1, 4, [0])])
def test_checkpoints_are_spread_and_end_with_the_last(many: int, most: int, chosen: list[int]) -> None:
    assert [int(one.name) for one in _spread([Path(str(n)) for n in range(many)], most)] == chosen
