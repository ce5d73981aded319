"""Looks every pinned version up in the published advisories, and never takes silence for safety.

pip-audit ends well where the service knows none of the packages (a mirror without advisories, say): that is said here,
and is a failure, as is a service that cannot be reached.
"""

import json
import subprocess
import sys
from pathlib import Path

PINS = Path(__file__).resolve().parents[1] / "constraints.txt"
UNKNOWN, FOUND = 2, 1


def main(program: str) -> int:
    """Run pip-audit; gives the exit status: 0 nothing known, 1 something is, 2 it could not be found out."""
    command = [program, "--requirement", str(PINS), "--no-deps", "--disable-pip", "--format", "json"]
    done = subprocess.run(
        [*command, "--progress-spinner", "off"], capture_output=True, text=True, timeout=600, check=False
    )
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        why = (done.stderr.strip().splitlines() or ["no reason was given"])[-1]
        print(f"The advisory service could not be asked, so nothing was checked: {why}", file=sys.stderr)
        return UNKNOWN
    found = [(one, advisory) for one in packages for advisory in one.get("vulns", [])]
    for one, advisory in found:
        fixed = ", ".join(advisory["fix_versions"]) or "no version yet"
        print(f"{one['name']} {one['version']}: {advisory['id']}, mended in {fixed}")
    skipped = [one["name"] for one in packages if "skip_reason" in one]
    if skipped:
        detail = f"The advisory service knows nothing of {len(skipped)} of {len(packages)} packages, so they were not"
        print(f"{detail} checked: {', '.join(skipped)}. Is it a mirror without advisories?", file=sys.stderr)
    if not found and not skipped:
        print(f"no advisory speaks of any of {len(packages)} pinned versions")
    return FOUND if found else UNKNOWN if skipped else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
