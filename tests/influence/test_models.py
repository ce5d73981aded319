"""What is loaded, what is refused, and what is attributed."""

import json
import shutil
from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

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


def test_an_adapter_of_another_model_is_refused(tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_adapter_dir, tmp_path / "adapter")
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor[:, :-1].contiguous() for name, tensor in load_file(file).items()}, file)
    with pytest.raises(ModelError, match="does not fit"):
        load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("one", folder),)))


def test_checkpoints_must_attribute_the_same_modules(tiny_model_dir: Path, tiny_adapter_dir: Path) -> None:
    with pytest.raises(ModelError, match="checkpoint"):
        load(ModelSpec(tiny_model_dir, checkpoints=(Checkpoint("a", tiny_adapter_dir), Checkpoint("b"))))


def test_the_model_writes_its_own_answer_the_same_each_time(tiny_model_dir: Path) -> None:
    model = load(ModelSpec(tiny_model_dir))
    answers = {model.generate((Message("user", "Where?"),), max_new_tokens=12) for _ in range(2)}
    assert len(answers) == 1
    assert answers.pop()
