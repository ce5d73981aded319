"""Each fault as a function: it breaks something, checks that nothing was lost, and gives the figures that it reached.

The tests run them small, `benchmarks/faults.py` at length.
"""

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from app.influence.building import build
from app.influence.corpus import parse_row
from app.influence.index import IndexSpec, open_index
from app.influence.models import ModelSpec, load
from tests.api.harness import must, rows, until
from tests.faults.stack import LONG_LEASE_S, ROOT, WAIT_S, Stack, WorkerProcess

Figures = dict[str, Any]
AWAY_S = 3.0
UNHURRIED = {"HEADWATER_LEASE_S": str(LONG_LEASE_S)}
SPREAD = 0.7  # of a build is done when its last worker is killed


def reference(stack: Stack, name: str, count: int) -> dict[str, bytes]:
    """The files of a build that nothing broke."""
    stack.prepare(name, count)
    with stack.working(2):
        stack.succeeded(stack.build(f"{name}-unbroken", name))
    return stack.files(f"{name}-unbroken")


def whole(stack: Stack, index: str, unbroken: dict[str, bytes], count: int) -> None:
    """The index is the unbroken one, byte for byte, and has each row once."""
    files = stack.files(index)
    assert files.keys() == unbroken.keys()
    assert [name for name in files if files[name] != unbroken[name]] == []
    ids = open_index(stack.path(index)).ids
    assert (len(ids), len(set(ids))) == (count, count)


def workers_killed(stack: Stack, name: str, unbroken: dict[str, bytes], count: int, kills: int) -> Figures:
    """kill -9 of a worker, again and again during one build, spread over it, each at a random moment."""
    index = f"{name}-killed"
    with stack.working(2) as workers:
        job_id = stack.build(index, name)
        for number in range(kills):
            stack.done(job_id, SPREAD * number / kills)
            time.sleep(random.uniform(0, 0.3))
            assert stack.api.job(job_id)["state"] == "running", f"it ended after {number} kills"
            random.choice([worker for worker in workers if worker.alive]).kill()
            workers.append(stack.start_worker())
        began = time.monotonic()
        job = stack.succeeded(job_id)
    whole(stack, index, unbroken, count)
    tasks = stack.tasks(job_id)
    return {
        "kills": kills,
        "tasks": len(tasks),
        "tasks taken again": sum(task["attempts"] - 1 for task in tasks),
        "attempts": job["attempts"],
        "seconds after the last kill": round(time.monotonic() - began, 1),
    }


def api_killed(stack: Stack, name: str, unbroken: dict[str, bytes], count: int) -> Figures:
    """kill -9 of the API while a job runs and another waits: the workers go on without it."""
    indexes = [f"{name}-api-{number}" for number in range(2)]
    with stack.working(2, **UNHURRIED):
        jobs = [stack.build(index, name) for index in indexes]
        before = stack.done(jobs[0], 0.2)["progress"]["done"]
        stack.kill_api()
        ready_s = stack.start_api()
        for job_id in jobs:
            assert stack.succeeded(job_id)["attempts"] == 1
    for index in indexes:
        whole(stack, index, unbroken, count)
    return {
        "rows done at the kill": before,
        "jobs": len(jobs),
        "lost": 0,
        "seconds until the API answers": round(ready_s, 1),
    }


def redis_away(stack: Stack, name: str, unbroken: dict[str, bytes], count: int, times: int) -> Figures:
    """Redis stopped and started during a build; a job that is submitted meanwhile is done when it is back."""
    indexes, slowest, back = [], 0.0, 0.0
    with stack.working(2):
        for number in range(times):
            pair = [f"{name}-redis-{number}-{which}" for which in ("before", "meanwhile")]
            running = stack.build(pair[0], name)
            stack.done(running, 0.1)
            stack.redis.stop()
            began = time.monotonic()
            meanwhile = stack.build(pair[1], name)
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(AWAY_S)
            stack.redis.start()
            began = time.monotonic()
            stack.api.wait(meanwhile, "running", "succeeded")
            back = max(back, time.monotonic() - began)
            for job_id in (running, meanwhile):
                stack.succeeded(job_id)
            indexes += pair
    for index in indexes:
        whole(stack, index, unbroken, count)
    return {
        "stops": times,
        "jobs": 2 * times,
        "lost": 0,
        "slowest submission, s": round(slowest, 2),
        "longest until the waiting job ran, s": round(back, 1),
    }


def postgres_away(stack: Stack, name: str, unbroken: dict[str, bytes], count: int, times: int) -> Figures:
    """PostgreSQL stopped and started during a build: the workers wait, the API says 503, the job goes on."""
    statuses: set[int] = set()
    back = 0.0
    for number in range(times):
        index = f"{name}-postgres-{number}"
        with stack.working(2):
            job_id = stack.build(index, name)
            stack.done(job_id, 0.1)
            stack.postgres.stop()
            end = time.monotonic() + AWAY_S
            while time.monotonic() < end:
                statuses.add(stack.api.get(f"/jobs/{job_id}").status_code)
                time.sleep(0.2)
            stack.postgres.start()
            began = time.monotonic()
            until(lambda job_id=job_id: stack.api.get(f"/jobs/{job_id}").status_code, lambda status: status == 200)
            at = stack.api.job(job_id)["version"]
            until(lambda job_id=job_id: stack.api.job(job_id), lambda job, at=at: job["version"] > at)
            back = max(back, time.monotonic() - began)
            stack.succeeded(job_id)
        whole(stack, index, unbroken, count)
    assert statuses == {503}
    return {"stops": times, "jobs failed": 0, "longest until the job moved again, s": round(back, 1)}


def disk_full(stack: Stack, name: str, unbroken: dict[str, bytes], count: int) -> Figures:
    """No room for a shard: the job says so, keeps what it has, and goes on when there is room."""
    index, by = f"{name}-full", "RLIMIT_FSIZE"
    shard = max(len(content) for content in unbroken.values())
    job_id = stack.build(index, name)  # nobody works yet
    folder = stack.path(index)
    folder.mkdir()
    small = os.geteuid() == 0 and small_disk(folder, shard + shard // 2)
    try:
        with stack.working(1, file_limit=0 if small else shard // 2):
            failed = stack.api.wait(job_id)
        assert (failed["state"], failed["error"]["code"]) == ("failed", "DiskFull"), failed
        assert "disk" in failed["error"]["detail"]
        assert not (folder / "manifest.json").exists()
        assert not list(folder.rglob("*.part"))
        kept = len(list(folder.glob("shards/*.json")))
        if small:
            by = "a tmpfs"
            size = 4 * sum(map(len, unbroken.values()))
            subprocess.run(["mount", "-o", f"remount,size={size}", str(folder)], check=True)
        must(stack.api.post(f"/jobs/{job_id}/retry"), 202)
        with stack.working(2):
            stack.succeeded(job_id)
        whole(stack, index, unbroken, count)
    finally:
        if small:
            subprocess.run(["umount", str(folder)], check=True)
    must(stack.api.delete(f"/indexes/{index}"), 204)
    return {"full": by, "shards kept for the retry": kept, "half-written files": 0}


def small_disk(folder: Path, size: int) -> bool:
    """Put a small file system there, if this user may."""
    options = f"size={size},mode=0755"
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    return done.returncode == 0


def shards_damaged(stack: Stack, name: str, unbroken: dict[str, bytes], count: int) -> Figures:
    """A finished shard is cut, another has a bit flipped, before the index is published: both are computed again."""
    index = f"{name}-damaged"

    def finished() -> list[Path]:
        shards = stack.path(index) / "shards"
        return [file for record in sorted(shards.glob("*.json")) if (file := record.with_suffix(".faiss")).exists()]

    with stack.working(1) as workers:
        job_id = stack.build(index, name)
        first, second, *_ = until(finished, lambda files: len(files) >= 2)
        workers[0].signal(signal.SIGSTOP)
        os.truncate(first, first.stat().st_size // 2)
        with second.open("r+b") as file:
            file.seek(-9, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-9, os.SEEK_END)
            file.write(bytes([byte ^ 1]))
        workers[0].signal(signal.SIGCONT)
        stack.succeeded(job_id)
    whole(stack, index, unbroken, count)
    again = [task for task in stack.tasks(job_id) if task["stage"] == "gradients" and task["attempts"] > 1]
    assert len(again) >= 2
    return {"damaged": 2, "computed again": len(again), "published damaged": 0}


def built_twice_at_once(stack: Stack, name: str, unbroken: dict[str, bytes], count: int, times: int) -> Figures:
    """The same index is asked for many times at once, and two processes that know nothing of each other build it."""
    body = {"name": f"{name}-twice", "model": "tiny", "dataset": name}
    statuses = at_once(8, lambda: stack.api.post("/indexes", json=body).status_code)
    assert sorted(statuses) == [202] + [409] * 7
    with stack.working(2):
        (job,) = [j for j in must(stack.api.get("/jobs"))["items"] if j["state"] in ("queued", "running")]
        stack.succeeded(job["id"])
        repairs = at_once(8, lambda: stack.api.post(f"/indexes/{name}-twice/repair").status_code)
        assert sorted(repairs) == [202] + [409] * 7
        until(lambda: must(stack.api.get(f"/indexes/{name}-twice"))["state"], lambda state: state == "ready")
    whole(stack, f"{name}-twice", unbroken, count)
    for number in range(times):
        path = stack.folder / f"{name}-raced-{number}"
        command = [sys.executable, "-c", RACE, str(stack.model_dir), str(path), str(count)]
        racers = [subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}) for _ in range(2)]
        assert [racer.wait(300) for racer in racers] == [0, 0]
        assert {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()} == unbroken
    return {"submissions at once": 8, "accepted": 1, "processes in one folder": 2, "times": times, "differing bytes": 0}


RACE = """
import sys
from pathlib import Path
from tests.faults.scenarios import race
race(*map(Path, sys.argv[1:3]), int(sys.argv[3]))
"""


def race(model_dir: Path, path: Path, count: int) -> None:
    """Build what the service builds, with the library alone."""
    for _ in build(path, load(ModelSpec(model_dir)), [parse_row(row) for row in rows(count)], IndexSpec()):
        pass


def given_twice(stack: Stack, name: str, unbroken: dict[str, bytes], count: int, times: int) -> Figures:
    """A worker is frozen in the middle of its task, another is given the task, and the first wakes up and goes on."""
    late = 0
    for number in range(times):
        index = f"{name}-twice-given-{number}"
        with stack.working(1) as workers:
            job_id = stack.build(index, name)
            stack.done(job_id, 0.1)
            workers[0].signal(signal.SIGSTOP)
            task = until(lambda job_id=job_id: running_task(stack, job_id), bool)
            workers.append(stack.start_worker())
            until(lambda job_id=job_id, at=task["number"]: stack.tasks(job_id)[at], lambda t: t["attempts"] > 1)
            workers[0].signal(signal.SIGCONT)
            stack.succeeded(job_id)
            late += 1
        whole(stack, index, unbroken, count)
    return {"tasks with two workers": late, "rows doubled": 0, "differing bytes": 0}


def running_task(stack: Stack, job_id: str) -> dict[str, Any] | None:
    """A task that a worker has, if there is one."""
    running = [task for task in stack.tasks(job_id) if task["state"] == "running"]
    return running[0] if running else None


def hung_up(stack: Stack, index: str, times: int) -> Figures:
    """Clients that hang up in the middle of /influence: the others are answered, and nothing is left behind."""
    ask = {"index": index, "prompt": "Who?", "generation": "The mill number 3 is green.", "top_k": 3}
    body = stack.api.build_request("POST", "/influence", json=ask).content
    head = (
        f"POST /influence HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    expected = must(stack.api.post("/influence", json=ask))["proponents"]
    answered: list[bool] = []

    def others() -> None:
        for _ in range(max(3, times // 5)):
            found = must(stack.api.post("/influence", json=ask))
            answered.append(found["proponents"] == expected)

    thread = threading.Thread(target=others)
    thread.start()
    for number in range(times):
        with socket.create_connection(("127.0.0.1", stack.port)) as client:
            client.sendall(head.encode() + body[: len(body) if number % 3 else 20])
            time.sleep(random.uniform(0, 0.02))
    thread.join(60)
    until(lambda: gauge(stack, "headwater_influence_waiting"), lambda waiting: waiting == 0)
    assert must(stack.api.post("/influence", json=ask))["proponents"] == expected
    assert answered and all(answered)
    return {"hung up": times, "others answered": len(answered), "wrong answers": 0, "still waiting": 0}


def gauge(stack: Stack, name: str) -> float:
    """What Prometheus would read."""
    lines = stack.api.get("/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name) and "_created" not in line)


def clocks_disagree(stack: Stack, name: str, unbroken: dict[str, bytes], count: int) -> Figures:
    """Workers whose clocks are an hour fast and an hour slow: no lease runs out early, and a dead worker's does."""
    index = f"{name}-clocks"
    with stack.working(1, clock_s=3600, **UNHURRIED) as fast, stack.working(1, clock_s=-3600, **UNHURRIED) as slow:
        job_id = stack.build(index, name)
        stack.done(job_id, 0.1)
        leases = [t["lease"] for t in (running_task(stack, job_id) for _ in range(20)) if t is not None]
        stack.succeeded(job_id)
        hands = {task["worker"] for task in stack.tasks(job_id)}
        assert all(task["attempts"] == 1 for task in stack.tasks(job_id)), "a lease ran out"
        assert leases and all(0 < lease <= LONG_LEASE_S + 0.1 for lease in leases), leases
        whole(stack, index, unbroken, count)

        second = stack.build(f"{index}-killed", name)
        stack.done(second, 0.1)
        fast[0].kill()
        began = time.monotonic()
        stack.succeeded(second)
        assert slow[0].alive
        whole(stack, f"{index}-killed", unbroken, count)
    return {
        "clocks, h": "+1 and -1",
        "workers that had tasks": len(hands),
        "leases lost": 0,
        "dead worker's build ended after, s": round(time.monotonic() - began, 1),
    }


def cancelled(stack: Stack, name: str) -> Figures:
    """A cancel reaches every worker."""

    def said(worker: WorkerProcess, *words: str) -> bool:
        return any(word in worker.log.read_text() for word in words)

    with stack.working(2) as workers:
        job_id = stack.build(f"{name}-cancelled", name)
        until(lambda: [said(worker, '"stage": "gradients"') for worker in workers], all, WAIT_S)
        began = time.monotonic()
        must(stack.api.post(f"/jobs/{job_id}/cancel"), 202)
        until(lambda: stack.api.job(job_id)["state"], lambda state: state == "cancelled")
        ended = time.monotonic() - began
        until(lambda: [said(worker, "job ended", "no longer this worker's") for worker in workers], all)
        quiet = time.monotonic() - began
    return {"cancelled after, s": round(ended, 2), "both workers free after, s": round(quiet, 2)}


def terminated(stack: Stack, name: str, unbroken: dict[str, bytes], count: int) -> Figures:
    """SIGTERM: a worker hands its task back, and another goes on at once, not when a lease has run out."""
    index = f"{name}-terminated"
    with stack.working(1) as workers:
        job_id = stack.build(index, name)
        stack.done(job_id, 0.1)
        began = time.monotonic()
        workers[0].signal(signal.SIGTERM)
        until(lambda: workers[0].alive, lambda alive: not alive)
        ended = time.monotonic() - began
        assert running_task(stack, job_id) is None
        assert all(task["failures"] == 0 for task in stack.tasks(job_id))
        workers.append(stack.start_worker())
        stack.succeeded(job_id)
    whole(stack, index, unbroken, count)
    return {"ended after, s": round(ended, 2), "handed back": 1}


def at_once(many: int, call: Callable[[], int]) -> list[int]:
    """The same call from many threads at the same moment."""
    gate = threading.Barrier(many)

    def one(_number: int) -> int:
        gate.wait()
        return call()

    with ThreadPoolExecutor(many) as threads:
        return list(threads.map(one, range(many)))
