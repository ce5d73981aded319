"""The package stands alone (`make sdk` proves it in an empty environment)."""

import importlib
import subprocess
import sys

import pytest

import headwater_client
from headwater_client import errors
from tests.test_house import PROJECT, ROOT


def test_it_imports_nothing_that_it_does_not_bring() -> None:
    code = "import sys, headwater_client; print(*{name.partition('.')[0] for name in sys.modules})"
    paths = {"PYTHONPATH": str(ROOT / "sdk" / "src")}
    done = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True, check=True)
    foreign = {"app", "workers", "torch", "numpy", "pandas", "matplotlib", "transformers", "rich"}
    assert not foreign & set(done.stdout.split())


def test_it_is_of_the_services_version() -> None:
    assert headwater_client.__version__ == PROJECT["project"]["version"]


def test_what_is_exported_is_there() -> None:
    assert all(hasattr(headwater_client, name) for name in headwater_client.__all__)


def test_the_callback_names_the_package_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "headwater_client.integrations.trainer", raising=False)
    with pytest.raises(errors.PackageMissing, match="pip install transformers"):
        importlib.import_module("headwater_client.integrations.trainer")
