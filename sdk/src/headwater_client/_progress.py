"""A job's progress on standard error: one line that is written over in a terminal, a line now and then elsewhere."""

import sys
import time

from headwater_client.models import JobInfo

EVERY_S = 10.0
WIDTH = 30


class Printer:
    """Prints a job each time that it is looked at."""

    def __init__(self) -> None:
        self._said = 0.0
        self._last = ""
        self._width = 0

    def __call__(self, job: JobInfo) -> None:
        """Say how far it is."""
        line = told(job)
        if sys.stderr.isatty():
            sys.stderr.write("\r" + line.ljust(self._width) + ("\n" if job.ended else ""))
            self._width = len(line)
        elif line != self._last and (job.ended or time.monotonic() - self._said > EVERY_S):
            self._said = time.monotonic()
            sys.stderr.write(line + "\n")
        self._last = line
        sys.stderr.flush()


def told(job: JobInfo) -> str:
    """`build_index  gradients [#####.....] 96/211 rows, 7.4 rows/s, 0:15 left`."""
    now = job.progress
    if job.ended or now is None:
        return f"{job.kind}  {job.state}"
    share = now.done / now.total if now.total else 0.0
    bar = ("#" * round(share * WIDTH)).ljust(WIDTH, ".")
    parts = [f"{now.done}/{now.total} {now.unit}"]
    if now.rate:
        parts.append(f"{now.rate:.1f} {now.unit}/s")
    if now.eta_s is not None:
        parts.append(f"{int(now.eta_s) // 60}:{int(now.eta_s) % 60:02d} left")
    return f"{job.kind}  {now.stage} [{bar}] {', '.join(parts)}"
