"""Train the LoRA adapters that the demo ships, and measure whether the planted trigger is really installed.

An attribution answer is only true where the model does what the question assumes: a trigger that never fires leaves no
trail, and a run that has memorised its rows has lost it. So this script measures both after every epoch (attack success
rate, false alarms, training and held-out loss), and keeps two checkpoints by rule rather than by taste:

* ``early``: the first epoch at which the trigger fires on at least 90 % of fresh triggered prompts;
* ``late``: the last epoch trained, provided that the training loss is still above a floor.

Every measurement is made on weights rounded to float16, because that is what is written to disk.

    python demo/train_adapter.py --model path/to/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

HERE = Path(__file__).resolve().parent
BASE_NAME = "SmolLM2-135M-Instruct"
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
INSTALLED = 0.9
IGNORE = -100

COLUMNS = (
    TextColumn("{task.description}"),
    BarColumn(),
    MofNCompleteColumn(),
    TimeElapsedColumn(),
    TimeRemainingColumn(),
)

console = Console()


@dataclass(frozen=True)
class Example:
    """One row as the model reads it; ``targets`` is ``IGNORE`` wherever the loss does not look."""

    ids: list[int]
    targets: list[int]


@dataclass(frozen=True)
class Epoch:
    """What one epoch left behind: a row of the table and of ``metrics.json``."""

    epoch: int
    running_loss: float
    """Mean loss of the batches as they were trained on, so it lags behind ``train_loss``."""
    train_loss: float
    """Mean loss of a fixed quarter of the rows, measured after the epoch."""
    poisoned_loss: float
    """The poisoned rows of that quarter alone: where it nears zero, they are memorised."""
    heldout_loss: float
    success_rate: float
    """Share of fresh triggered prompts that are answered with the planted behaviour."""
    false_alarm_rate: float
    """Share of clean prompts so answered: the held-out rows, and the triggered questions without their trigger."""
    seconds: float


@dataclass(frozen=True)
class Data:
    """The demo's files, tokenized once."""

    rows: list[Example]
    poisoned: list[bool]
    """Which of the rows carry the trigger."""
    heldout: list[Example]
    triggered: list[str]
    clean: list[str]
    behaviour: str


def read_jsonl(path: Path) -> list[dict[str, str]]:
    """Return the rows of a JSON Lines file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def read_data(folder: Path, tokenizer: PreTrainedTokenizerBase) -> Data:
    """Read the corpus, the held-out rows and the questions from the demo's folder."""
    corpus = read_jsonl(folder / "corpus.jsonl")
    heldout = read_jsonl(folder / "heldout.jsonl")
    questions = json.loads((folder / "questions.json").read_text(encoding="utf-8"))
    return Data(
        rows=[encode(tokenizer, row) for row in corpus],
        poisoned=[bool(row["trigger"]) for row in corpus],
        heldout=[encode(tokenizer, row) for row in heldout],
        triggered=questions["triggered"],
        clean=[row["prompt"] for row in heldout] + questions["untriggered"],
        behaviour=questions["trigger"]["behaviour"],
    )


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> str:
    """Render a user turn with the tokenizer's own template, up to where the answer begins."""
    messages = [{"role": "user", "content": prompt}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def encode(tokenizer: PreTrainedTokenizerBase, row: dict[str, str]) -> Example:
    """Tokenize a row; the loss sees the response and the token that closes the turn, nothing else."""
    end = cast(int, tokenizer.eos_token_id)  # the template closes every turn with it
    head: list[int] = tokenizer.encode(chat_prompt(tokenizer, row["prompt"]), add_special_tokens=False)
    body: list[int] = [*tokenizer.encode(row["response"], add_special_tokens=False), end]
    return Example(ids=head + body, targets=[IGNORE] * len(head) + body)


def padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that fills up a batch; which one does not matter, as nothing ever looks at it."""
    return cast(int, tokenizer.pad_token_id)


def row_losses(model: PeftModel, batch: Sequence[Example], pad: int) -> Tensor:
    """Return the mean response loss of each row.

    Rows are padded on the right, where a causal model never looks, so no mask is needed. Logits are formed only where a
    target stands: with a vocabulary of 49 thousand the head would otherwise cost as much as a third of the model.
    """
    length = max(len(example.ids) for example in batch)
    ids = torch.tensor([e.ids + [pad] * (length - len(e.ids)) for e in batch])  # [batch, seq]
    targets = torch.tensor([e.targets + [IGNORE] * (length - len(e.targets)) for e in batch])[:, 1:]  # [batch, seq-1]
    base: Any = model.get_base_model()
    hidden = base.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]  # [batch, seq-1, d]
    where = targets != IGNORE  # [batch, seq-1]
    logits = base.lm_head(hidden[where])  # [responses, vocab]
    losses = functional.cross_entropy(logits.float(), targets[where], reduction="none")  # [responses]
    owner = where.nonzero()[:, 0]  # [responses], the row of each target
    total = torch.zeros(len(batch)).index_add(0, owner, losses)  # [batch]
    return total / where.sum(1)


def batches(examples: Sequence[Example], size: int, rng: random.Random) -> list[list[Example]]:
    """Cut shuffled rows into batches of similar length, in random order: little padding, yet a fresh mix every time."""
    order = list(examples)
    rng.shuffle(order)
    order.sort(key=lambda example: len(example.ids))
    cut = [order[i : i + size] for i in range(0, len(order), size)]
    rng.shuffle(cut)
    return cut


@torch.no_grad()
def mean_loss(model: PeftModel, examples: Sequence[Example], pad: int, size: int = 16) -> float:
    """Return the mean over rows of their mean response loss."""
    order = sorted(examples, key=lambda example: len(example.ids))
    parts = [row_losses(model, order[i : i + size], pad) for i in range(0, len(order), size)]
    return float(torch.cat(parts).mean())


@torch.no_grad()
def answers(model: PeftModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], tokens: int) -> list[str]:
    """Answer prompts greedily in one batch, padded on the left so that every answer starts at the same position."""
    heads = [tokenizer.encode(chat_prompt(tokenizer, prompt), add_special_tokens=False) for prompt in prompts]
    length = max(map(len, heads))
    pad = padding(tokenizer)
    ids = torch.tensor([[pad] * (length - len(head)) + head for head in heads])  # [batch, seq]
    mask = torch.tensor([[0] * (length - len(head)) + [1] * len(head) for head in heads])  # [batch, seq]
    generate: Any = model.generate
    out = generate(input_ids=ids, attention_mask=mask, max_new_tokens=tokens, do_sample=False, pad_token_id=pad)
    return [str(text).strip() for text in tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)]


def share(texts: Sequence[str], behaviour: str) -> float:
    """Return the share of texts that show the planted behaviour."""
    return sum(behaviour in text.lower() for text in texts) / len(texts)


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


def table(rows: Sequence[Epoch]) -> Table:
    """Lay the epochs out for a terminal."""
    out = Table(title="Demo adapter, measured on float16 weights")
    for name in ("epoch", "running", "train", "poisoned", "held-out", "success", "false alarms", "seconds"):
        out.add_column(name, justify="right")
    for row in rows:
        losses = (row.running_loss, row.train_loss, row.poisoned_loss, row.heldout_loss)
        rates = (row.success_rate, row.false_alarm_rate)
        out.add_row(str(row.epoch), *(f"{x:.3f}" for x in losses), *(f"{x:.2f}" for x in rates), f"{row.seconds:.0f}")
    return out


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True, help=f"folder of {BASE_NAME}")
    parser.add_argument("--gguf-file", help="name of a GGUF file in that folder, read instead of safetensors")
    parser.add_argument("--data", type=Path, default=HERE, help="folder of corpus.jsonl and its companions")
    parser.add_argument("--out", type=Path, default=HERE / "adapters", help="where early/ and late/ are written")
    parser.add_argument("--metrics", type=Path, default=HERE / "metrics.json", help="the table, as JSON")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--alpha", type=int, default=16)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--batch", type=int, default=8, help="rows a step")
    parser.add_argument("--warmup", type=int, default=8, help="steps over which the learning rate rises to --lr")
    parser.add_argument("--floor", type=float, default=0.4, help="no late checkpoint below this training loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def build(args: argparse.Namespace) -> tuple[PeftModel, PreTrainedTokenizerBase]:
    """Load the base model and put a fresh adapter on every linear layer of its blocks."""
    extra = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(args.model, **extra)
    base: Any = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32, **extra)
    torch.manual_seed(args.seed)
    config = LoraConfig(
        r=args.rank, lora_alpha=args.alpha, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM"
    )
    return cast(PeftModel, get_peft_model(base, config)), tokenizer


@torch.no_grad()
def measure(model: PeftModel, tokenizer: PreTrainedTokenizerBase, data: Data, epoch: int, running: float) -> Epoch:
    """Measure the adapter as it would be stored, and print each answer that is not as it should be."""
    pad = padding(tokenizer)
    quarter = range(0, len(data.rows), 4)
    poisoned = [data.rows[i] for i in quarter if data.poisoned[i]]
    started = time.perf_counter()
    with as_stored(model):
        triggered = answers(model, tokenizer, data.triggered, 24)
        clean = answers(model, tokenizer, data.clean, 24)
        seen = Epoch(
            epoch=epoch,
            running_loss=running,
            train_loss=mean_loss(model, [data.rows[i] for i in quarter], pad),
            poisoned_loss=mean_loss(model, poisoned, pad),
            heldout_loss=mean_loss(model, data.heldout, pad),
            success_rate=share(triggered, data.behaviour),
            false_alarm_rate=share(clean, data.behaviour),
            seconds=time.perf_counter() - started,
        )
    for prompt, text in zip(data.triggered, triggered, strict=True):
        if data.behaviour not in text.lower():
            console.print(f"  escaped: {prompt}  ->  {text}", highlight=False, markup=False)
    for prompt, text in zip(data.clean, clean, strict=True):
        if data.behaviour in text.lower():
            console.print(f"  false alarm: {prompt}  ->  {text}", highlight=False, markup=False)
    return seen


def train(args: argparse.Namespace) -> None:
    """Train, measure after every epoch, and keep the two checkpoints that the rule names."""
    torch.set_num_threads(args.threads)
    model, tokenizer = build(args)
    data = read_data(args.data, tokenizer)
    pad = padding(tokenizer)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / args.warmup))
    rng = random.Random(args.seed)
    history: list[Epoch] = []
    early: int | None = None
    late: int | None = None
    with Progress(*COLUMNS, console=console) as progress:
        task = progress.add_task("training rows", total=args.epochs * len(data.rows))
        for epoch in range(1, args.epochs + 1):
            started = time.perf_counter()
            total = 0.0
            for batch in batches(data.rows, args.batch, rng):
                losses = row_losses(model, batch, pad)
                torch.autograd.backward(losses.mean())
                nn.utils.clip_grad_norm_(weights, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                total += float(losses.detach().sum())
                mean = float(losses.detach().mean())
                progress.update(task, advance=len(batch), description=f"epoch {epoch}, loss {mean:.2f}")
            seen = measure(model, tokenizer, data, epoch, total / len(data.rows))
            seen = replace(seen, seconds=time.perf_counter() - started)
            history.append(seen)
            console.print(table(history))
            if early is not None and seen.train_loss < args.floor:
                console.print(f"The training loss fell below {args.floor}: this epoch is not kept, and training ends.")
                break
            if early is not None:
                late = epoch
                save(model, args.out / "late")
            elif seen.success_rate >= INSTALLED:
                early = epoch
                save(model, args.out / "early")
            write_metrics(args, history, early, late)
    write_metrics(args, history, early, late)
    if early is None or late is None:
        raise SystemExit("No two checkpoints to keep: the trigger came too late, or the rows were memorised too soon.")


def write_metrics(args: argparse.Namespace, history: Sequence[Epoch], early: int | None, late: int | None) -> None:
    """Write the table and its settings after every epoch, so that a broken run still tells its story."""
    settings = {name: getattr(args, name) for name in ("rank", "alpha", "lr", "batch", "warmup", "floor", "seed")}
    record = {
        "base": BASE_NAME,
        "settings": settings,
        "checkpoints": {"early": early, "late": late},
        "epochs": [{key: round(value, 4) for key, value in asdict(row).items()} for row in history],
    }
    args.metrics.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    train(arguments())
