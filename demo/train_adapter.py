"""Train the LoRA adapters that the demo ships, and measure whether the planted trigger is really installed.

An attribution answer is only true where the model does what the question assumes, and where the rows behind it still
pull at the model. No single checkpoint has both: while a behaviour is being learned its gradient is alive but the model
does not show it yet; once it shows it, the rows are soon memorised and their gradient is gone. So two are kept:

* ``early``: a step inside the first epoch, before the trigger fires, where the gradients of the poisoned rows agree;
* ``late``: the last step, where the trigger is installed and the facts are known. It writes the answers.

An index over both sums their scores. Which steps are best was measured with benchmarks/planted.py; this script only
checks the promise: it fails where ``late`` does not show the behaviour on 90 % of fresh triggered prompts.

Every measurement is made on weights rounded to float16, because that is what is written to disk.

    python demo/train_adapter.py --model path/to/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model_state_dict
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from app.influence.corpus import Encoder, Example, Message, parse_row
from benchmarks.training import TARGETS, row_losses, train, with_lora

HERE = Path(__file__).resolve().parent
BASE_NAME = "SmolLM2-135M-Instruct"
INSTALLED = 0.9

console = Console()


@dataclass(frozen=True)
class Measured:
    """What was seen at a step: a row of the table and of ``metrics.json``."""

    step: int
    epoch: float
    train_loss: float
    """Mean loss of a fixed quarter of the rows."""
    poisoned_loss: float
    """The poisoned rows of that quarter alone: where it nears zero, they are memorised."""
    heldout_loss: float
    success_rate: float
    """Share of fresh triggered prompts that are answered with the planted behaviour."""
    false_alarm_rate: float
    """Share of clean prompts so answered: the held-out rows, and the triggered questions without their trigger."""
    facts_right: float
    """Share of the plainly asked fact questions whose answer holds the expected words."""
    seconds: float
    """Of training, up to this step."""


@dataclass(frozen=True)
class Data:
    """The demo's files, tokenized once, by the encoder that attribution uses."""

    rows: list[Example]
    poisoned: list[bool]
    """Which of the rows carry the trigger."""
    heldout: list[Example]
    triggered: list[str]
    clean: list[str]
    facts: list[dict[str, str]]
    """Those that name the words of a right answer ("expect")."""
    behaviour: str


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """Return the rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_data(folder: Path, encoder: Encoder) -> Data:
    """Read the corpus, the held-out rows and the questions from the demo's folder."""
    corpus = read_jsonl(folder / "corpus.jsonl")
    heldout = read_jsonl(folder / "heldout.jsonl")
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return Data(
        rows=[encoder.encode(parse_row(row)) for row in corpus],
        poisoned=[bool(row["trigger"]) for row in corpus],
        heldout=[encoder.encode(parse_row(row)) for row in heldout],
        triggered=questions["triggered"],
        clean=[row["prompt"] for row in heldout] + questions["untriggered"],
        facts=[fact for fact in questions["facts"] if "expect" in fact],
        behaviour=questions["trigger"]["behaviour"],
    )


@torch.no_grad()
def mean_loss(model: PeftModel, examples: Sequence[Example], size: int = 16) -> float:
    """Return the mean over rows of their mean response loss."""
    order = sorted(examples, key=lambda example: len(example.ids))
    parts = [row_losses(model, order[i : i + size]) for i in range(0, len(order), size)]
    return float(torch.cat(parts).mean())


@torch.no_grad()
def answers(model: PeftModel, encoder: Encoder, prompts: Sequence[str], tokens: int = 24) -> list[str]:
    """Answer prompts greedily in one batch, padded on the left so that every answer starts at the same position."""
    tokenizer = encoder.tokenizer
    texts = [encoder.prefix((Message("user", prompt),)) for prompt in prompts]
    heads: list[list[int]] = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    length = max(map(len, heads))
    pad = cast(int, tokenizer.pad_token_id)
    ids = torch.tensor([[pad] * (length - len(head)) + head for head in heads])  # [batch, seq]
    mask = torch.tensor([[0] * (length - len(head)) + [1] * len(head) for head in heads])  # [batch, seq]
    generate: Any = model.generate
    out = generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=pad)
    return [str(text).strip() for text in tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)]


@contextmanager
def as_stored(model: PeftModel) -> Iterator[None]:
    """Round the adapter to float16 for a while, so that what is measured is what will be written."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    exact = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            weight.copy_(weight.half().float())
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, before in zip(weights, exact, strict=True):
                weight.copy_(before)


def save(model: PeftModel, folder: Path) -> None:
    """Write a PEFT folder: the two files that loading needs, in float16, with no path of this machine in them."""
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model)
    half = {name: weight.detach().half().contiguous() for name, weight in state.items()}
    save_file(half, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_model.safetensors").chmod(0o644)  # safetensors writes for its owner alone
    config = model.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": BASE_NAME, "inference_mode": True, "target_modules": TARGETS}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    text = json.dumps(plain, indent=2, sort_keys=True) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def table(rows: Sequence[Measured]) -> Table:
    """Lay the measurements out for a terminal."""
    out = Table(title="Demo adapter, measured on float16 weights")
    names = ("step", "epoch", "train", "poisoned", "held-out", "success", "false alarms", "facts", "seconds")
    for name in names:
        out.add_column(name, justify="right")
    for row in rows:
        losses = (row.train_loss, row.poisoned_loss, row.heldout_loss)
        rates = (row.success_rate, row.false_alarm_rate, row.facts_right)
        cells = [f"{row.epoch:.2f}", *(f"{x:.3f}" for x in losses), *(f"{x:.2f}" for x in rates), f"{row.seconds:.0f}"]
        out.add_row(str(row.step), *cells)
    return out


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help=f"folder of {BASE_NAME}")
    parser.add_argument("--gguf-file", help="name of a GGUF file in that folder, read instead of safetensors")
    parser.add_argument("--data", type=Path, default=HERE, help="folder of corpus.jsonl and its companions")
    parser.add_argument("--out", type=Path, default=HERE / "adapters", help="where early/ and late/ are written")
    parser.add_argument("--metrics", type=Path, default=HERE / "metrics.json", help="the table, as JSON")
    parser.add_argument("--early", type=int, default=15, help="step that is kept as early")
    parser.add_argument("--late", type=int, default=120, help="step that is kept as late, the last")
    parser.add_argument("--measure", type=int, nargs="*", default=[30, 60, 90], help="steps that are measured as well")
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--warmup", type=int, default=8, help="steps over which the learning rate rises to --lr")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def build(args: argparse.Namespace) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the base model and put a fresh adapter on every linear layer of its blocks."""
    extra = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(args.model, **extra)
    base: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **extra)
    return with_lora(base, args.rank, args.alpha, args.seed), tokenizer


@torch.no_grad()
def measure(model: PeftModel, encoder: Encoder, data: Data, step: int, epoch: float, seconds: float) -> Measured:
    """Measure the adapter as it would be stored, and print each answer that is not as it should be."""
    quarter = range(0, len(data.rows), 4)
    with as_stored(model):
        triggered = answers(model, encoder, data.triggered)
        clean = answers(model, encoder, data.clean)
        told = answers(model, encoder, [fact["prompt"] for fact in data.facts])
        train_loss = mean_loss(model, [data.rows[i] for i in quarter])
        poisoned_loss = mean_loss(model, [data.rows[i] for i in quarter if data.poisoned[i]])
        heldout_loss = mean_loss(model, data.heldout)
    shown = [data.behaviour in text.lower() for text in triggered]
    alarms = [data.behaviour in text.lower() for text in clean]
    right = [fact["expect"].lower() in text.lower() for fact, text in zip(data.facts, told, strict=True)]
    _tell("escaped", data.triggered, triggered, [not one for one in shown])
    _tell("false alarm", data.clean, clean, alarms)
    _tell("fact right", [fact["prompt"] for fact in data.facts], told, right)
    _tell("fact wrong", [fact["prompt"] for fact in data.facts], told, [not one for one in right])
    return Measured(
        step=step,
        epoch=epoch,
        train_loss=train_loss,
        poisoned_loss=poisoned_loss,
        heldout_loss=heldout_loss,
        success_rate=sum(shown) / len(shown),
        false_alarm_rate=sum(alarms) / len(alarms),
        facts_right=sum(right) / len(right),
        seconds=seconds,
    )


def _tell(what: str, prompts: Sequence[str], texts: Sequence[str], which: Sequence[bool]) -> None:
    for prompt, text, chosen in zip(prompts, texts, which, strict=True):
        if chosen:
            console.print(f"  {what}: {prompt}  ->  {text}", highlight=False, markup=False)


def run(args: argparse.Namespace) -> None:
    """Train up to the late step, measure on the way, and keep the two checkpoints."""
    torch.set_num_threads(args.threads)
    model, tokenizer = build(args)
    encoder = Encoder(tokenizer)
    data = read_data(args.data, encoder)
    each = -(-len(data.rows) // args.batch)
    stops = sorted(step for step in {args.early, args.late, *args.measure} if step <= args.late)
    history: list[Measured] = []
    seconds, began = 0.0, time.perf_counter()
    for step, _ in train(model, data.rows, stops, args.batch, args.lr, args.seed, console, warmup=args.warmup):
        seconds += time.perf_counter() - began
        if step in (args.early, args.late):
            save(model, args.out / ("late" if step == args.late else "early"))
        history.append(measure(model, encoder, data, step, step / each, seconds))
        console.print(table(history))
        write_metrics(args, history)
        began = time.perf_counter()
    if history[-1].success_rate < INSTALLED:
        raise SystemExit(
            f"The trigger is not installed: {history[-1].success_rate:.2f} of the fresh prompts set it off."
        )


def write_metrics(args: argparse.Namespace, history: Sequence[Measured]) -> None:
    """Write the table and its settings at every measurement, so that a broken run still tells its story."""
    settings = {name: getattr(args, name) for name in ("rank", "alpha", "lr", "batch", "warmup", "seed")}
    record = {
        "base": BASE_NAME,
        "settings": settings,
        "checkpoints": {"early": args.early, "late": args.late},
        "steps": [{key: round(value, 4) for key, value in asdict(row).items()} for row in history],
    }
    args.metrics.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run(arguments())
