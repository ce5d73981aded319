"""What the tests share.

A real, tiny Llama with a byte tokenizer, trained for a moment, and a LoRA adapter: made once a session. And where the
service keeps its catalog and its queue: a test that takes `backend` (or `database`, `queue`, `serve`, `api`) runs once
on SQLite with the queue in the process, and once on PostgreSQL with Redis.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from app.catalog.database import Database
from tests.servers import postgres, postgres_database, redis_database, redis_server

BACKENDS = ("sqlite", "postgres")
TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}\n{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


SLOW = ("faults", "contract", "stack", "demo", "sharded", "builders", "damage", "restart", "test_running")
"""Files that take longest, which are begun first (`make test` gives each file to one process)."""


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: next((at for at, name in enumerate(SLOW) if name in item.nodeid), len(SLOW)))


@pytest.fixture(autouse=True)
def _no_handler_is_left() -> Iterator[None]:
    """A command that ran in this process sends logs to a stream that is closed after it."""
    yield
    for handler in logging.getLogger().handlers[:]:
        if type(handler) is logging.StreamHandler:
            logging.getLogger().removeHandler(handler)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


def make_tiny_model(root: Path) -> Path:
    """Write the model and its tokenizer to a folder."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, "</s>": 1, "<pad>": 2, **{letter: i + 3 for i, letter in enumerate(letters)}}
    vocabulary["th"] = len(vocabulary)  # one merge, which a GGUF file cannot do without
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config)
    train(model, fast)
    model.save_pretrained(root)
    fast.save_pretrained(root)
    return root


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Two seconds, after which the model writes words rather than broken characters or nothing at all."""
    chat = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "north of the hill, so they say"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


@pytest.fixture(scope="session")
def tiny_adapter_dir(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(1)
    base = LlamaForCausalLM.from_pretrained(tiny_model_dir)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight.data *= 0.05  # small beside the base, as an adapter is
    path = tmp_path_factory.mktemp("adapters") / "tiny"
    model.save_pretrained(path)
    return path


@dataclass(frozen=True)
class Backend:
    """Where a service keeps its catalog and its queue."""

    database_url: str
    queue_url: str

    @property
    def settings(self) -> dict[str, str]:
        """As settings of the service."""
        return {"database_url": self.database_url, "queue_url": self.queue_url}


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """A PostgreSQL server."""
    with postgres() as url:
        yield url


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis server."""
    with redis_server() as url:
        yield url


@pytest.fixture(scope="session")
def migrated_postgres(postgres_url: str) -> Iterator[str]:
    """A database with the newest schema and nothing in it, to copy."""

    async def migrate() -> None:
        database = Database(url)
        await database.migrate()
        await database.close()

    with postgres_database(postgres_url) as url:
        asyncio.run(migrate())
        yield url


@contextmanager
def backend_for(request: pytest.FixtureRequest, folder: Path) -> Iterator[Backend]:
    """The backend that a parametrised fixture was asked for; the servers are looked for when a test needs them."""
    if request.param == "sqlite":
        yield Backend(f"sqlite+aiosqlite:///{folder / 'headwater.db'}", "memory://")
        return
    server, template, queues = (
        request.getfixturevalue(name) for name in ("postgres_url", "migrated_postgres", "redis_url")
    )
    with ExitStack() as stack:
        yield Backend(
            stack.enter_context(postgres_database(server, template)), stack.enter_context(redis_database(queues))
        )


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Backend]:
    """Empty, and the test's own."""
    with backend_for(request, tmp_path) as made:
        yield made


@pytest_asyncio.fixture
async def database(backend: Backend) -> AsyncIterator[Database]:
    """A migrated catalog."""
    database = Database(backend.database_url)
    await database.migrate()
    yield database
    await database.close()
