"""`make audit` says what it found, and takes no silence for safety."""

import subprocess
import sys
from pathlib import Path

import pytest

AUDIT = Path(__file__).resolve().parents[1] / ".ci" / "audit.py"
KNOWN = '{"name": "a", "version": "1", "vulns": []}'
BAD = '{"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}'
SKIPPED = '{"name": "c", "skip_reason": "not found"}'


@pytest.mark.parametrize(
    ("packages", "status", "says"),
    [
        ([KNOWN], 0, "no advisory speaks of any of 1"),
        ([KNOWN, BAD], 1, "b 2: CVE-1, mended in 3"),
        ([KNOWN, SKIPPED], 2, "knows nothing of 1 of 2 packages"),
        ([BAD, SKIPPED], 1, "knows nothing of 1 of 2 packages"),
        (None, 2, "could not be asked, so nothing was checked: ConnectionError: away"),
    ],
)
def test_the_audit(tmp_path: Path, packages: list[str] | None, status: int, says: str) -> None:
    program = tmp_path / "pip-audit"
    answer = "echo 'ConnectionError: away' >&2; exit 1"
    if packages is not None:
        answer = f"echo '{{\"dependencies\": [{', '.join(packages)}]}}'"
    program.write_text(f"#!/bin/sh\n{answer}\n")
    program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, str(AUDIT), str(program)], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
