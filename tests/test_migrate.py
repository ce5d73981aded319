"""`headwater migrate` on both databases, and a service that says what is wrong with its schema."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import BACKENDS
from tests.servers import postgres_database

ROOT = Path(__file__).resolve().parents[1]
Command = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without a table, written as an operator writes it."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'catalog.db'}"
        return
    with postgres_database(request.getfixturevalue("postgres_url")) as made:
        yield made.replace("postgresql+psycopg://", "postgres://")


def headwater(url: str, data_dir: Path, *arguments: str) -> "subprocess.Popen[str]":
    given = {"HEADWATER_DATABASE_URL": url, "HEADWATER_DATA_DIR": str(data_dir), "NO_COLOR": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "app.cli", *arguments],
        cwd=ROOT,
        env=os.environ | given,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ended(process: "subprocess.Popen[str]") -> tuple[int, str]:
    said, _ = process.communicate(timeout=120)
    return process.returncode, said


def test_migrate_goes_up_down_and_checks(url: str, tmp_path: Path) -> None:
    def run(*arguments: str) -> tuple[int, str]:
        return ended(headwater(url, tmp_path, "migrate", *arguments))

    status, said = run("--check")
    assert (status, "run `headwater migrate`" in said) == (1, True), said
    status, said = run()
    assert (status, "was at revision base" in said) == (0, True), said
    assert run("--check")[0] == 0
    status, said = run("--to", "0001")
    assert (status, "is at 0001" in said) == (0, True), said
    status, said = run("--check")
    assert (status, "at revision 0001" in said) == (1, True), said
    status, said = run("--to", "nonsense")
    assert (status, "'nonsense'" in said, "Traceback" in said) == (1, True, False), said
    assert run()[0] == 0


def test_a_service_on_a_postgres_of_another_revision_names_the_command(postgres_url: str, tmp_path: Path) -> None:
    with postgres_database(postgres_url) as url:
        status, said = ended(headwater(url, tmp_path, "serve", "--port", "0"))
        assert (status, "run `headwater migrate`" in said, "Traceback" in said) == (1, True, False), said


def test_a_service_without_its_postgres_says_so(tmp_path: Path) -> None:
    url = "postgresql://ann:hunter2@127.0.0.1:1/headwater"
    status, said = ended(headwater(url, tmp_path, "serve", "--port", "0"))
    assert (status, "the database does not answer" in said, "Traceback" in said) == (1, True, False), said
    assert "hunter2" not in said


def test_two_who_migrate_at_once_leave_one_schema(postgres_url: str, tmp_path: Path) -> None:
    with postgres_database(postgres_url) as url:
        both = [headwater(url, tmp_path, "migrate") for _ in range(2)]
        assert [ended(one)[0] for one in both] == [0, 0]
        assert ended(headwater(url, tmp_path, "migrate", "--check"))[0] == 0


def test_a_database_that_is_neither_is_refused(tmp_path: Path) -> None:
    status, said = ended(headwater("mysql://ann@localhost/x", tmp_path, "migrate"))
    assert (status, "HEADWATER_DATABASE_URL" in said, "PostgreSQL" in said) == (1, True, True), said
