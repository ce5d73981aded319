"""What is loaded, what is refused, and what is attributed."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.influence import models
from app.influence.corpus import Encoder, Message, parse_row
from app.influence.errors import ModelError
from app.influence.gradients import gradients, plan_for
from app.influence.models import Checkpoint, ModelSpec, load
from app.influence.projection import ProjectionSpec


def as_gguf(source: Path, folder: Path) -> Path:
    """The tiny model as a GGUF file, as a converter would write it."""
    folder.mkdir()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(source), AutoTokenizer.from_pretrained(source)
    config = model.config
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)  # type: ignore[arg-type]
    writer.add_token_list(words)
    writer.add_token_types([gguf.TokenType.CONTROL if i < 3 else gguf.TokenType.NORMAL for i in range(len(words))])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(tokenizer.chat_template)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.float().contiguous()
        if name.endswith(("q_proj.weight", "k_proj.weight")):  # GGUF interleaves the rotary halves of each head
            heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            array = array.view(heads, 2, -1, array.shape[1]).transpose(1, 2).reshape(array.shape).contiguous()
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return folder


def test_a_gguf_file_gives_the_gradients_of_the_model_it_was_made_from(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = as_gguf(tiny_model_dir, tmp_path / "gguf")
    vectors = []
    for spec in (ModelSpec(tiny_model_dir), ModelSpec(folder, gguf_file="tiny.gguf")):
        model = load(spec)
        example = Encoder(model.tokenizer).encode(parse_row({"prompt": "Who?", "response": "Orla does."}))
        found = gradients(model, model.checkpoints[0], plan_for(model, ProjectionSpec()), [example])
        vectors.append(found.vectors[0])
    assert (vectors[0] - vectors[1]).norm() <= 1e-4 * vectors[0].norm()


def test_an_adapter_attributes_a_and_b_and_lists_the_rest(tiny_model_dir: Path, tiny_adapter_dir: Path) -> None:
    model = load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("one", tiny_adapter_dir),)))
    assert len(model.attributed) == 2 * 7 * 2  # layers, linear modules, A and B
    assert all(module.name.endswith(("lora_A", "lora_B")) for module in model.attributed)
    reasons = {module.kind: module.reason for module in model.skipped}
    assert reasons["Linear"] == "frozen under the adapter"
    assert {"Embedding", "LlamaRMSNorm"} <= set(reasons)


def test_the_base_attributes_every_linear_module_but_the_head(tiny_model_dir: Path) -> None:
    model = load(ModelSpec(tiny_model_dir))
    assert len(model.attributed) == 2 * 7
    assert any(module.name.endswith("lm_head") for module in model.skipped)


def broken(folder: Path, kind: str) -> None:
    weights = folder / "model.safetensors"
    if kind == "pickled":
        torch.save(load_file(weights), folder / "pytorch_model.bin")
        weights.unlink()
    elif kind == "nan":
        tensors = load_file(weights)
        tensors["model.norm.weight"][0] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "remote code":
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "mine",
            "auto_map": {"AutoModelForCausalLM": "mine.Model", "AutoConfig": "mine.Config"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "mine.py").write_text("raise SystemExit('this code ran')\n")
    elif kind == "a weight short":
        tensors = load_file(weights)
        del tensors["model.layers.0.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif kind == "an adapter's":
        (folder / "adapter_config.json").write_text("{}")
    elif kind == "empty":
        shutil.rmtree(folder)
        folder.mkdir()


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pickled", "pickled"),
        ("nan", "NaN"),
        ("truncated", "cannot be loaded"),
        ("remote code", "cannot be loaded"),
        ("empty", "no safetensors"),
        ("a weight short", "lacks 1"),
        ("an adapter's", "adapter's folder"),
    ],
)
def test_a_folder_that_is_no_model_we_load_is_refused(
    tiny_model_dir: Path, tmp_path: Path, kind: str, words: str
) -> None:
    folder = shutil.copytree(tiny_model_dir, tmp_path / "model")
    broken(folder, kind)
    with pytest.raises(ModelError, match=words) as caught:
        load(ModelSpec(folder))
    assert caught.value.field == "path"


@pytest.mark.parametrize("how", ["narrower", "short of a weight", "of a deeper model"])
def test_an_adapter_that_does_not_fit_is_refused(
    tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path: Path, how: str
) -> None:
    folder = shutil.copytree(tiny_adapter_dir, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    name = next(iter(weights))
    if how == "narrower":
        weights[name] = weights[name][:, :-1].contiguous()
    elif how == "short of a weight":
        del weights[name]
    else:
        weights[name.replace("layers.0", "layers.7")] = weights[name].clone()
    save_file(weights, file)
    with pytest.raises(ModelError, match="does not fit") as caught:
        load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("one", folder),)))
    assert caught.value.field == "checkpoints.0.adapter"


@pytest.mark.parametrize("name", ["v1.0", "train", "half", "items"])
def test_a_checkpoint_may_have_any_name(tiny_model_dir: Path, tiny_adapter_dir: Path, name: str) -> None:
    model = load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint(name, tiny_adapter_dir),)))
    assert len(model.attributed) == 28 and f"adapter:{name}" in model.fingerprint


def test_a_device_that_is_not_there_is_refused(tiny_model_dir: Path) -> None:
    with pytest.raises(ModelError, match="device") as caught:
        load(ModelSpec(tiny_model_dir, device="cuda:99"))
    assert caught.value.field == "device"


def test_a_module_that_runs_twice_is_skipped_and_listed(tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = models._read

    def shared(*args: Any) -> Any:
        model = read(*args)
        model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
        return model

    monkeypatch.setattr(models, "_read", shared)
    model = load(ModelSpec(tiny_model_dir))
    assert len(model.attributed) == 12
    assert [module.name for module in model.skipped if "2 times" in module.reason] == ["model.layers.0.mlp.up_proj"]


def test_the_order_and_weights_of_checkpoints_are_in_the_fingerprint(
    tiny_model_dir: Path, tiny_adapter_dir: Path
) -> None:
    a, b = Checkpoint("a", tiny_adapter_dir), Checkpoint("b", tiny_adapter_dir)
    runs = [(a, b), (b, a), (a, Checkpoint("b", tiny_adapter_dir, weight=2.0))]
    prints = [load(ModelSpec(tiny_model_dir, checkpoints=run)).fingerprint["checkpoints"] for run in runs]
    assert len(set(prints)) == 3


def test_checkpoints_must_attribute_the_same_modules(tiny_model_dir: Path, tiny_adapter_dir: Path) -> None:
    with pytest.raises(ModelError, match="checkpoint"):
        load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("a", tiny_adapter_dir), Checkpoint("b"))))


def test_the_model_writes_its_own_answer_the_same_each_time(tiny_model_dir: Path) -> None:
    model = load(ModelSpec(tiny_model_dir))
    answers = {model.generate((Message("user", "Where?"),), max_new_tokens=12) for _ in range(2)}
    assert len(answers) == 1
    assert answers.pop()
