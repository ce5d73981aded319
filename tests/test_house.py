"""The house's rules, those that no linter holds."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from app.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PINS = [
    line for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if line[:1] not in ("#", "")
]
CODE = ("app", "workers", "migrations", "demo", "benchmarks")
SOURCES = sorted(path for folder in CODE for path in ROOT.glob(f"{folder}/**/*.py"))
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("demo/*.md")])


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert found is not None, requirement
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def test_imports_point_one_way() -> None:
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_science_is_held_apart_by_a_contract() -> None:
    contracts = {tuple(one.get("source_modules", ())) for one in PROJECT["tool"]["importlinter"]["contracts"]}
    assert ("app.influence",) in contracts


def test_every_dependency_is_pinned() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"]]
    wanted += [one for extra in ("cpu", "otel", "ray", "docs", "ui", "dev") for one in extras[extra]]
    assert {name_of(one) for one in wanted} <= {name_of(pin) for pin in PINS}


@pytest.mark.parametrize("pin", PINS)
def test_a_pin_is_a_name_and_a_version_that_any_index_has(pin: str) -> None:
    assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][0-9a-z.]*", pin), "no local version, no address, no path"


def test_faiss_for_the_cpu_and_for_the_gpu_never_come_together() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    owners = {extra for extra, wanted in extras.items() if any("faiss" in one for one in wanted)}
    assert owners == {"cpu", "gpu"}
    assert not any("faiss" in one for one in PROJECT["project"]["dependencies"])


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_unpickled_and_no_foreign_code_is_run(source: Path) -> None:
    for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            named = [alias.name for alias in node.names] + [getattr(node, "module", None) or ""]
            assert not {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"} & {
                name.partition(".")[0] for name in named
            }
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("torch.load", "eval", "exec"), f"line {node.lineno}"
            assert called.rpartition(".")[2] not in ("read_pickle", "unpickle"), f"line {node.lineno}"
            assert "allow_pickle" not in [word.arg for word in node.keywords], f"line {node.lineno}"
            trusting = [word for word in node.keywords if word.arg == "trust_remote_code"]
            assert all(ast.unparse(word.value) == "False" for word in trusting), f"line {node.lineno}"


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_link_between_pages_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        made = (page.parent / target).resolve().parent == ROOT / "docs/reference"  # by `make docs`, which looks for it
        assert made or (page.parent / target).exists(), target


def test_make_help_lists_every_target() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    phony = re.search(r"^\.PHONY: (.+)$", makefile, re.M)
    assert phony is not None
    assert set(phony[1].split()) == set(re.findall(r"^([a-z-]+):.*## ", makefile, re.M))


def test_ci_runs_what_the_readme_tells_a_newcomer_to_run() -> None:
    steps = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert "\nmake test\n" in steps
    assert "\nmake test " in (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_setting_says_what_it_does() -> None:
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
