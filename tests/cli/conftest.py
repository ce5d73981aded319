"""A running service, for commands that talk to one."""

from collections.abc import Callable

import pytest
from typer.testing import CliRunner, Result

from app.cli import app
from app.settings import Settings
from tests.api.harness import Api
from tests.sdk.conftest import service

__all__ = ["service"]
Run = Callable[..., Result]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: object, service: Api) -> Run:
    """A command that talks to the service; it must end with this code."""
    monkeypatch.chdir(str(tmp_path))
    for name in Settings.model_fields:
        monkeypatch.delenv(f"HEADWATER_{name.upper()}", raising=False)
    variables = {"COLUMNS": "160", "NO_COLOR": "1", "HEADWATER_URL": str(service.base_url)}

    def invoke(*arguments: object, code: int = 0, stdin: str | None = None, **more: str) -> Result:
        done = CliRunner(env=variables | more).invoke(app, [str(one) for one in arguments], input=stdin)
        assert done.exit_code == code, done.output + str(done.exception)
        return done

    return invoke
