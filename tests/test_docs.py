"""The documentation's reference is what the code says, and is kept nowhere."""

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

from app.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = json.loads((ROOT / "openapi/openapi.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def reference() -> ModuleType:
    """The hook that `make docs` runs."""
    spec = importlib.util.spec_from_file_location("reference", ROOT / ".ci/reference.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_made_at_the_build_and_committed_nowhere(reference: ModuleType) -> None:
    assert ".ci/reference.py" in yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["hooks"]
    kept = subprocess.run(
        ["git", "ls-files", "docs"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {f"docs/{name}" for name in reference.pages()} & set(kept)


def test_it_names_every_setting_with_its_explanation(reference: ModuleType) -> None:
    text = reference.pages()["reference/settings.md"]
    for name, field in Settings.model_fields.items():
        assert f"| `HEADWATER_{name.upper()}` |" in text
        assert " ".join((field.description or "").split()).replace("|", "\\|") in text


def test_it_names_every_operation_and_every_body(reference: ModuleType) -> None:
    pages = reference.pages()
    for path, operations in DOCUMENT["paths"].items():
        for method in operations:
            assert f"### `{method.upper()} {path}`" in pages["reference/endpoints.md"]
    for name in DOCUMENT["components"]["schemas"]:
        assert f"## {name}\n" in pages["reference/schemas.md"]


def test_it_names_every_problem_with_what_to_do(reference: ModuleType) -> None:
    lines = [line for line in reference.pages()["reference/problems.md"].splitlines() if line.startswith("| `")]
    assert len(lines) > 20
    assert [line for line in lines if line.endswith("|  |")] == []


def test_a_link_out_of_the_documentation_becomes_a_name(reference: ModuleType) -> None:
    page = SimpleNamespace(file=SimpleNamespace(src_uri="howto/a.md"))
    text = reference.on_page_markdown(
        "[the log](../../CHANGELOG.md), [x](../scores.md), [demo/a.py](../../demo/a.py)", page=page
    )
    assert text == "the log (`CHANGELOG.md`), [x](../scores.md), demo/a.py"


@pytest.mark.parametrize("picture", sorted((ROOT / "docs/images").iterdir()), ids=lambda path: path.name)
def test_a_picture_is_small_and_is_shown_somewhere(picture: Path) -> None:
    assert picture.stat().st_size < 200_000
    texts = [ROOT / "README.md", ROOT / "mkdocs.yml", *ROOT.glob("docs/**/*.md")]
    assert any(f"images/{picture.name}" in text.read_text(encoding="utf-8") for text in texts)
