"""Headwater beside its peers: the same model, the same token ids, one process and one environment each, one thread.

    python benchmarks/peers.py answers     # every peer's scores on the model of quality.py, for its --answers
    python benchmarks/peers.py cost        # collection, memory, bytes and queries on SmolLM2-135M, repeats in turns
    python benchmarks/peers.py cost --only headwater bergson --rows 24 --repeats 5

Each peer is installed at a pinned version without its dependencies, those that it lacks beside it, in an environment
that sees this one's packages (torch above all) behind its own; where that fails, with all that it asks for. What fails
is a row of the table, with the last line of what it said. benchmarks/peers/ has one driver a peer.

Cost is that of the loop over the rows, not of the start of a process. RapidIn's procedure is measured on a few rows,
since it takes seconds for each. A repeat runs all contenders one after the other, and ratios are taken within it: a
busy machine slows all alike.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "out"
DRIVERS = Path(__file__).resolve().parent / "peers"
sys.path.insert(0, str(DRIVERS))

from exchange import write_samples  # noqa: E402  (the drivers' own, which they import by its bare name)

from app.influence.corpus import Encoder, Row, read_rows  # noqa: E402

TIME_LIMIT_S = 3600
BUDGET = 1024
"""Padded tokens a batch."""

console = Console()
if not console.is_terminal:
    console.width = 150


@dataclass(frozen=True)
class Peer:
    """What is installed for a driver, and what of it is there already."""

    driver: str
    requirements: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    """What it imports and this environment lacks."""


PEERS = {
    "headwater": Peer("peer_headwater.py"),
    "RapidIn procedure": Peer("peer_rapidin.py"),
    "bergson": Peer(
        "peer_bergson.py",
        ("bergson==2.5.1",),
        (
            *("bitsandbytes==0.50.2", "datasets==5.2.0", "dill==0.4.1", "docstring-parser==0.18.0", "graphviz==0.21"),
            *("jaxtyping==0.3.11", "ml_dtypes==0.6.0", "multiprocess==0.70.19", "natsort==8.4.0", "optree==0.20.0"),
            *(
                "pandas==3.1.1",
                "petname==2.9",
                "python-dateutil==4.0.0",
                "scipy==1.17.1",
                "simple-parsing==0.1.9",
            ),
            *(
                "pytz==2026.6",
                "six==1.17.0",
                "torchopt==0.7.3",
                "tzdata==2026.6",
                "wadler-lindig==0.1.8",
                "xxhash==4.1.0",
            ),
        ),
    ),
    "kronfluence": Peer(
        "peer_kronfluence.py", ("kronfluence==1.0.1",), ("einconv==0.1.0", "einops==0.8.2", "opt_einsum==3.4.0")
    ),
    "captum": Peer(
        "peer_captum.py",
        ("captum==0.9.0",),
        (
            *("contourpy==1.3.3", "cycler==0.12.1", "fonttools==4.68.0", "kiwisolver==1.5.1", "matplotlib==3.11.2"),
            *("pillow==13.0.0", "pyparsing==3.3.3", "python-dateutil==4.0.0", "tzdata==2026.6"),
        ),
    ),
    "traker": Peer("peer_traker.py", ("traker==0.3.2",)),
    "dattri": Peer("peer_dattri.py", ("dattri==0.3.0",), ("scipy==1.17.1",)),
    "dattri-llm": Peer("peer_dattri_llm.py", ("dattri-llm==0.1.0",)),
}


@dataclass(frozen=True)
class Entry:
    """A peer with a method: a row of a table."""

    name: str
    peer: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)


ANSWERS = (
    Entry("bergson TrackStar", "bergson", "trackstar"),
    Entry("bergson TrackStar, mean loss", "bergson", "trackstar", {"loss_reduction": "mean"}),
    Entry("bergson EK-FAC, mean loss", "bergson", "ekfac", {"loss_reduction": "mean"}),
    Entry("kronfluence EK-FAC, mean loss", "kronfluence", "ekfac", {"reduction": "mean"}),
    Entry("kronfluence EK-FAC", "kronfluence", "ekfac", {"reduction": "sum"}),
    Entry("captum TracInCP", "captum", "exact"),
    Entry("TRAK, 1 checkpoint", "traker", "trak"),
    Entry("dattri LoGra", "dattri", "Identity"),
    Entry("dattri LoGra, eFIM", "dattri", "eFIM", {"damping": 1e-3}),
    Entry("dattri-llm GradCos", "dattri-llm", "GradCos"),
    Entry("dattri-llm EK-FAC", "dattri-llm", "EKFAC"),
    Entry("RapidIn procedure", "RapidIn procedure", "rapidin"),
)
COST = (
    Entry("Headwater", "headwater", "build"),
    Entry("bergson", "bergson", "build"),
    Entry("RapidIn procedure", "RapidIn procedure", "build"),
)


class Failed(Exception):
    """A peer could not be installed or run; the message is the last line that it said."""


def environment(name: str) -> Path:
    """The interpreter of a peer; made where it is not there yet, or was made for other versions.

    Raises:
        Failed: neither way of installing worked.
    """
    peer = PEERS[name]
    if not peer.requirements:
        return Path(sys.executable)
    folder = ROOT / ".headwater" / "peers" / name
    python, stamp = folder / "bin" / "python", folder / "made-of.txt"
    wanted = "\n".join((*peer.requirements, *peer.beside))
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    with console.status(f"environment of {name}"):
        _call([sys.executable, "-m", "venv", str(folder)])
        where = _call([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
        (Path(where) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        try:
            # Not isolated: what builds from source finds torch and a compiler's wrapper in this environment.
            _call([*pip, "--no-deps", "--no-build-isolation", *peer.requirements, *peer.beside])
        except Failed:
            _call([*pip, *peer.requirements])
    stamp.write_text(wanted, encoding="utf-8")
    return python


def run(entry: Entry, folder: Path, threads: int) -> dict[str, Any]:
    """Run a driver on the job in a folder; what it measured.

    Raises:
        Failed: it ended with an error, or not in time.
    """
    for stale in ("result.json", "scores.npy"):
        (folder / stale).unlink(missing_ok=True)
    python = environment(entry.peer)
    settings = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    settings |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    settings["PYTHONPATH"] = str(ROOT) if entry.peer == "headwater" else ""
    with console.status(entry.name):
        _call([str(python), str(DRIVERS / PEERS[entry.peer].driver), str(folder)], settings, folder)
    told: dict[str, Any] = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    return told


def _call(command: Sequence[str], settings: dict[str, str] | None = None, where: Path | None = None) -> str:
    try:
        done = subprocess.run(command, env=settings, cwd=where, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired as error:
        raise Failed(f"not done after {TIME_LIMIT_S} s") from error
    if where is not None:
        (where / "log.txt").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode:
        raise Failed(next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no word of it")[:200])
    return done.stdout


def write_job(folder: Path, entry: Entry, model: Path, latency: int = 0) -> None:
    """What a driver is to do; rows and queries are written by the caller."""
    job = {"model": str(model), "method": entry.method, "options": entry.options, "budget": BUDGET, "latency": latency}
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")


def answers(arguments: argparse.Namespace) -> dict[str, Any]:
    """Every peer's scores on the laboratory's last checkpoint, kept for quality.py."""
    from retraining import Laboratory, Recipe  # torch and transformers: not needed by the other command

    laboratory = Laboratory(OUT, Recipe())
    (spec,) = laboratory.checkpoints((laboratory.recipe.epochs,))
    table = Table("peer", "collection, tokens/s", "peak MiB", "outcome", title="Peers on the model of quality.py")
    record: dict[str, Any] = {}
    for entry in _chosen(ANSWERS, arguments.only):
        folder = OUT / "answers" / entry.name.replace(" ", "_")
        folder.mkdir(parents=True, exist_ok=True)
        for name, examples in (("rows", laboratory.rows), ("queries", laboratory.queries)):
            write_samples(folder / f"{name}.npz", [e.ids for e in examples], [e.targets for e in examples])
        write_job(folder, entry, spec.path)
        try:
            record[entry.name] = run(entry, folder, arguments.threads)
            told = record[entry.name]
            figures = [f"{told[k]:,.0f}" if k in told else "" for k in ("tokens_per_second", "peak_mib")]
            table.add_row(entry.name, *figures, "scores written")
        except Failed as error:
            record[entry.name] = {"failed": str(error)}
            table.add_row(entry.name, "", "", f"failed: {error}")
        console.print(f"[dim]{entry.name}: {record[entry.name]}[/dim]")
    console.print(table)
    return record


def cost(arguments: argparse.Namespace) -> dict[str, Any]:
    """Collection in turns, memory, bytes a row, and queries; ratios within each repeat."""
    rows = list(islice(read_rows(arguments.data), arguments.rows))
    few = rows[: arguments.few]
    entries = _chosen(COST, arguments.only)
    found: dict[str, list[dict[str, Any]]] = {entry.name: [] for entry in entries}
    failures: dict[str, str] = {}
    for repeat in range(arguments.repeats):
        for entry in entries:
            mine = few if entry.peer == "RapidIn procedure" else rows
            folder = OUT / "cost" / entry.name.replace(" ", "_")
            _texts(folder, arguments.model, mine, rows[: arguments.queries])
            write_job(folder, entry, arguments.model, arguments.queries if repeat == arguments.repeats - 1 else 0)
            try:
                found[entry.name].append(run(entry, folder, arguments.threads))
            except Failed as error:
                failures[entry.name] = str(error)
    http = Entry("Headwater over HTTP", "headwater", "http")
    if arguments.http:
        found[http.name] = []
        folder = OUT / "cost" / "http"
        _texts(folder, arguments.model, rows, rows[: arguments.queries])
        write_job(folder, http, arguments.model, arguments.queries)
        try:
            found[http.name].append(run(http, folder, arguments.threads))
        except Failed as error:
            failures[http.name] = str(error)
    title = f"{len(rows)} rows of {arguments.data.name}, {arguments.model.name}, p = 16, {arguments.threads} thread(s)"
    table = Table("", "tokens/s", "Headwater over it", "peak MiB", "bytes a row", "query p50, ms", "p95", title=title)
    record: dict[str, Any] = {"rows": len(rows), "repeats": arguments.repeats, "failed": failures}
    for name, runs in found.items():
        if not runs:
            table.add_row(name, "failed", "", "", "", failures.get(name, ""), "")
            continue
        one = record[name] = _summary(runs, found.get("Headwater", []))
        cells = [_cell(one, key, form) for key, form in (("tokens_per_second", ",.1f"), ("ratio", ".2f"))]
        cells += [_cell(one, key, ",.0f") for key in ("peak_mib", "bytes_per_row", "query_p50_ms", "query_p95_ms")]
        table.add_row(name, *cells)
    console.print(table)
    return record


def _summary(runs: Sequence[dict[str, Any]], ours: Sequence[dict[str, Any]]) -> dict[str, Any]:
    last = runs[-1]
    one: dict[str, Any] = {"runs": list(runs)}
    for key in ("tokens_per_second", "peak_mib", "bytes_per_row"):
        values = [run[key] for run in runs if key in run]
        if values:
            one[key] = statistics.median(values)
    if "tokens_per_second" in last and len(ours) == len(runs):
        pairs = zip(ours, runs, strict=True)
        one["ratio"] = statistics.median(mine["tokens_per_second"] / its["tokens_per_second"] for mine, its in pairs)
    if seconds := last.get("query_seconds"):
        one["query_p50_ms"], one["query_p95_ms"] = (float(x) * 1000 for x in np.percentile(seconds, (50, 95)))
    return one


def _cell(one: dict[str, Any], key: str, form: str) -> str:
    return format(one[key], form) if key in one else ""


def _texts(folder: Path, model: Path, rows: Sequence[Row], queries: Sequence[Row]) -> None:
    """A job's rows and queries, as tokens and as texts; a query is a row of the data, which the model reads anew."""
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    encoder = Encoder(AutoTokenizer.from_pretrained(model, local_files_only=True), max_length=1024)
    examples = [encoder.encode(row) for row in rows]
    asked = [encoder.encode_query(row.messages[:-1], row.response)[0] for row in queries]
    for name, some in (("rows", examples), ("queries", asked)):
        write_samples(folder / f"{name}.npz", [e.ids for e in some], [e.targets for e in some])
    (folder / "rows.jsonl").write_text("".join(row.to_json() + "\n" for row in rows), encoding="utf-8")
    told = [{"messages": [vars(m) for m in row.messages[:-1]], "generation": row.response} for row in queries]
    (folder / "queries.jsonl").write_text("".join(json.dumps(one) + "\n" for one in told), encoding="utf-8")


def _chosen(entries: Sequence[Entry], only: Sequence[str] | None) -> list[Entry]:
    return [entry for entry in entries if not only or entry.peer in only]


def main() -> None:
    """Install, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("answers", "cost"))
    parser.add_argument("--only", nargs="+", choices=sorted(PEERS), help="these peers")
    parser.add_argument("--model", type=Path, default=ROOT / ".headwater" / "models" / "SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, default=ROOT / "demo" / "corpus.jsonl")
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--few", type=int, default=4, help="rows for RapidIn's procedure")
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--http", action="store_true", help="queries over HTTP as well")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where the figures are written")
    arguments = parser.parse_args()
    record = answers(arguments) if arguments.what == "answers" else cost(arguments)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        console.print(f"[dim]written to {arguments.json}[/dim]")


if __name__ == "__main__":
    main()
