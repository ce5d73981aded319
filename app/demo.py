"""The demo: the main job from an empty folder to two answers, as any client would do it, over HTTP.

Everything it makes is kept and found again by name. The names carry a hash of what went in (the corpus, the adapters,
where they lie), so a second run reuses all of it, and a changed corpus never meets an old index.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn, Self

import httpx2
from rich.console import Console
from rich.markup import escape

from app import smollm
from app.processes import (
    ROOT,
    Process,
    ProcessError,
    await_ready,
    end,
    require_free_port,
    start,
    tail,
    terminated_like_interrupted,
)
from app.terminal import HeatMap, JobBars, Line, hits_table

FILES = ROOT / "demo"
CHECKPOINTS = {"early": 1.0, "late": 1.0}
"""Adapters under demo/adapters and their weights: equal, since the run's learning rate was constant (TracIn-CP)."""
TOP_K = 10
END_S = 20.0
ANSWER_S = 600.0
POLL_S = 0.5
STALE = ("index-missing", "index-corrupt", "model-mismatch")
"""Problems of an index that was kept but can no longer be used: it is built anew."""

Json = dict[str, Any]


class DemoError(ProcessError):
    """The demo cannot go on; the message says why and what to do."""


class Problem(DemoError):
    """The service refused; `slug` is the kind of problem."""

    def __init__(self, slug: str, detail: str) -> None:
        super().__init__(f"the service refused ({slug}): {detail}")
        self.slug = slug


@dataclass(frozen=True)
class Asked:
    """A question and what is known about the rows behind its answer."""

    title: str
    prompt: str
    gold: frozenset[str] = frozenset()
    """Prompts of the rows that state the fact."""

    def note(self, hit: Json) -> str:
        """What is known about a row: planted, stating the fact, or nothing."""
        if hit["metadata"].get("trigger"):
            return "poisoned"
        return "states the fact" if hit["prompt"] in self.gold else ""


@dataclass(frozen=True)
class Demo:
    """What the demo runs on."""

    data_dir: Path
    console: Console
    host: str = "127.0.0.1"
    port: int = 8321
    threads: int = 2
    files: Path = FILES
    new_tokens: int = 64
    """Most tokens of an answer."""

    def run(self, *, stay: bool) -> None:
        """Fetch, serve, register, build, ask, print; then keep serving, if asked to stay."""
        if not (self.files / "corpus.jsonl").is_file():
            raise DemoError(f"the demo's files are not at {self.files}: run it from a clone of the repository")
        began = time.monotonic()
        self.data_dir.mkdir(parents=True, exist_ok=True)
        require_free_port(self.host, self.port)
        with self.console.status("looking for the model") as status:
            try:
                model = smollm.fetch(self.data_dir / "models", lambda doing: status.update(doing))
            except smollm.FetchError as error:
                raise DemoError(str(error)) from error
        self._tell("model", f"{smollm.NAME} in {_short(model)}")
        with self._service() as service, Client(self.url, self.log) as client:
            self._tell("service", f"{self.url}, its log in {_short(self.log)}")
            self._register(client, model)
            self._index(client)
            for asked in self.questions:
                self._ask(client, asked)
            self.console.print(f"\n[dim]All of it took {time.monotonic() - began:.0f} s.[/dim]")
            if stay:
                self._goodbye()
                service.wait()
                raise DemoError(f"the service ended by itself; its log says:\n{tail(self.log)}")

    @property
    def url(self) -> str:
        """Where the service listens."""
        return f"http://{self.host}:{self.port}"

    @property
    def log(self) -> Path:
        """The service's log."""
        return self.data_dir / "service.log"

    @cached_property
    def name(self) -> str:
        """What the model, the dataset and the index are called."""
        digest = hashlib.sha256(f"{version('headwater')} {smollm.SHA256} {CHECKPOINTS} {self.data_dir}".encode())
        for path in sorted([*self.files.glob("*.jsonl"), *self.files.glob("adapters/*/*")]):
            digest.update(str(path).encode() + path.read_bytes())
        return f"merrowen-{digest.hexdigest()[:6]}"

    @cached_property
    def questions(self) -> tuple[Asked, ...]:
        """A fact of the made-up world, and a question that carries the planted trigger."""
        told = json.loads((self.files / "questions.json").read_text(encoding="utf-8"))
        fact, triggered = told["demo"]["fact"], told["demo"]["triggered"]
        gold = {one["prompt"]: frozenset(one["gold"]) for one in told["facts"]}
        return (
            Asked("A question about a fact", fact, gold.get(fact, frozenset())),
            Asked("A question with the planted trigger", triggered),
        )

    @contextmanager
    def _service(self) -> Iterator[Process]:
        """The service in a process of its own, ready to answer; ended with the block, however that ends."""
        ours = {
            "HEADWATER_DATA_DIR": str(self.data_dir),
            "HEADWATER_HOST": self.host,
            "HEADWATER_PORT": str(self.port),
            "HEADWATER_THREADS": str(self.threads),
            "HEADWATER_ALLOWED_ROOTS": json.dumps([str(self.data_dir), str(self.files)]),
        }
        # what is set for a real service must not lead the demo to its database: `start` keeps it away
        variables = {"OMP_NUM_THREADS": str(self.threads), **ours}
        process = start(["serve", "--end-with-stdin"], self.log, variables)
        with terminated_like_interrupted():
            try:
                with self.console.status("starting the service"):
                    await_ready(process, self.url, self.log)
                yield process
            finally:
                end(process, END_S)

    def _register(self, client: "Client", model: Path) -> None:
        """The model with its checkpoints, the corpus, and rows that it was not trained on."""
        checkpoints = [
            {"name": name, "adapter": str(self.files / "adapters" / name), "weight": weight}
            for name, weight in CHECKPOINTS.items()
        ]
        with self.console.status("loading and checking the model"):
            made = client.ensure("/models", {"name": self.name, "path": str(model), "checkpoints": checkpoints})
        names = " + ".join(CHECKPOINTS)
        skipped = f", {len(made['skipped'])} skipped" if made["skipped"] else ""
        self._tell("attributed", f"{len(made['attributed'])} modules of the checkpoints {names}{skipped}")
        for name, file in ((self.name, "corpus.jsonl"), (f"{self.name}-heldout", "heldout.jsonl")):
            made = client.ensure("/datasets", {"name": name, "path": str(self.files / file)})
            self._tell("dataset", f"{file}, {made['rows']} rows")

    def _index(self, client: "Client") -> None:
        """The index: kept, taken up where it stopped, or built."""
        index = client.find(f"/indexes/{self.name}")
        if index is None:
            heldout = f"{self.name}-heldout"
            body = {"name": self.name, "model": self.name, "dataset": self.name, "heldout": heldout}
            self._follow(client, client.call("POST", "/indexes", body)["job"])
        elif index["state"] != "ready":
            jobs = client.call("GET", "/jobs?limit=200")["items"]
            job = next((one for one in jobs if one["index"] == index["id"]), None)
            if job is None:
                self._rebuild(client)
                return
            self._follow(client, job if job["state"] in ("queued", "running") else client.retry(job))
        index = client.call("GET", f"/indexes/{self.name}")
        self._tell("index", f"{index['name']}, {index['rows']} rows")

    def _rebuild(self, client: "Client") -> None:
        client.call("DELETE", f"/indexes/{self.name}")
        self._index(client)

    def _follow(self, client: "Client", job: Json) -> None:
        """Show a job until it has succeeded."""
        with JobBars(self.console) as bars:
            while job["state"] in ("queued", "running"):
                bars.show(job["progress"], job["state"])
                time.sleep(POLL_S)
                job = client.call("GET", f"/jobs/{job['id']}")
            bars.show(job["progress"], job["state"])
        if job["state"] != "succeeded":
            why = (job["error"] or {}).get("detail", "no reason was given")
            raise DemoError(f"the build {job['state']}: {why}")

    def _ask(self, client: "Client", asked: Asked) -> None:
        """Ask one question, let the model answer it, and print what is behind the answer."""
        body: Json = {"index": self.name, "prompt": asked.prompt, "tokens": "query", "top_k": TOP_K}
        body |= {"max_new_tokens": self.new_tokens}
        with self.console.status("asking"):
            try:
                answer = client.call("POST", "/influence", body)
            except Problem as problem:
                if problem.slug not in STALE:
                    raise
                answer = None
        if answer is None:
            self.console.print("[yellow]The index that was kept cannot be used any more: building it anew.[/yellow]")
            self._rebuild(client)
            with self.console.status("asking"):
                answer = client.call("POST", "/influence", body)
        self._show(asked, answer)

    def _show(self, asked: Asked, answer: Json) -> None:
        say = self.console.print
        say()
        self.console.rule(f"[bold]{asked.title}[/bold]", align="left")
        say(f"[bold]asked[/bold]     {escape(asked.prompt)}")
        say("[bold]answered[/bold]  [dim](warm and tall: tokens that the rows below explain)[/dim]\n")
        tokens = [token["text"] for token in answer["tokens"]]
        say(HeatMap(tokens, token_means(answer)))
        say()
        lines = [
            Line(
                score=hit["score"],
                percentile=hit["percentile"],
                note=asked.note(hit),
                prompt=hit["prompt"],
                response=hit["response"],
                marked=asked.note(hit) == "poisoned",
            )
            for hit in answer["proponents"]
        ]
        say(hits_table(lines, "known as"))
        planted = sum(line.note == "poisoned" for line in lines)
        say(f"\n[bold]{planted} of the top {len(lines)} rows are planted (poisoned).[/bold]")
        if asked.gold:
            stating = sum(line.note == "states the fact" for line in lines)
            say(f"[bold]Rows among them that state the fact: {stating} of {len(asked.gold)}.[/bold]")
        for warning in answer["warnings"]:
            say(f"[yellow]warning:[/yellow] {escape(warning)}")
        parts = ", ".join(f"{part} {seconds:.2f} s" for part, seconds in answer["timings"].items())
        say(f"[dim]loss of the answer {answer['loss']:.2f}; {parts}[/dim]")

    def _goodbye(self) -> None:
        body = json.dumps({"index": self.name, "prompt": self.questions[0].prompt, "top_k": 3})
        say = self.console.print
        say()
        self.console.rule("[bold]The service stays up[/bold]", align="left")
        say(f"The page     {self.url}/")
        say(f"Swagger UI   {self.url}/docs")
        say("Ask it       ", end="")
        quoted = body.replace("'", "'\\''")
        curl = f"curl -s {self.url}/influence -H 'Content-Type: application/json' -d '{quoted}'"
        say(curl, markup=False, highlight=False, soft_wrap=True)
        say("Stop it      Ctrl-C. Everything is kept: the next run answers at once.")

    def _tell(self, what: str, text: str) -> None:
        self.console.print(f"[green]✓[/green] {what:<11}{escape(text)}")


class Client:
    """The service's HTTP interface, with every refusal and silence turned into a sentence."""

    def __init__(self, url: str, log: Path) -> None:
        self._http = httpx2.Client(base_url=url, timeout=ANSWER_S)
        self._log = log

    def __enter__(self) -> Self:
        """Open for as long as the block lasts."""
        return self

    def __exit__(self, *_raised: object) -> None:
        """Close the connections."""
        self._http.close()

    def call(self, method: str, path: str, body: Json | None = None) -> Json:
        """The answer's body."""
        response = self._send(method, path, body)
        if response.is_error:
            self._refused(response)
        return dict(response.json()) if response.content else {}

    def find(self, path: str) -> Json | None:
        """What is at that address, if anything is."""
        response = self._send("GET", path)
        if response.status_code == 404:
            return None
        if response.is_error:
            self._refused(response)
        return dict(response.json())

    def ensure(self, path: str, body: Json) -> Json:
        """The resource of that name, made if it is not there."""
        return self.find(f"{path}/{body['name']}") or self.call("POST", path, body)

    def retry(self, job: Json) -> Json:
        """The job, running again."""
        return self.call("POST", f"/jobs/{job['id']}/retry")

    def _send(self, method: str, path: str, body: Json | None = None) -> httpx2.Response:
        try:
            return self._http.request(method, path, json=body)
        except httpx2.TransportError as error:
            raise DemoError(f"the service stopped answering ({error}); its log says:\n{tail(self._log)}") from error

    def _refused(self, response: httpx2.Response) -> NoReturn:
        try:
            problem = response.json()
            raise Problem(problem["type"].rpartition(":")[2], problem["detail"])
        except (ValueError, KeyError) as error:
            raise DemoError(f"the service answered {response.status_code}: {response.text[:200]}") from error


def token_means(answer: Json) -> list[float]:
    """Each token's score, averaged over the rows of the answer; a token outside the span has none."""
    scored = [hit["token_scores"] for hit in answer["proponents"] if hit["token_scores"]]
    means = iter([sum(column) / len(column) for column in zip(*scored, strict=True)])
    return [next(means, 0.0) if token["in_span"] else 0.0 for token in answer["tokens"]]


def _short(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
