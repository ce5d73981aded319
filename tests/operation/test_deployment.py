"""The files that an operator deploys with say nothing that is not there."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.metrics import MetricWrapperBase

from app.api.metrics import Metrics
from app.jobs.metrics import JobMetrics
from app.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
OURS = ("migrate", "api", "worker")
DASHBOARD: dict[str, Any] = json.loads((ROOT / "ops/grafana/headwater.json").read_text())
QUERIES = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
ALERTS = yaml.safe_load((ROOT / "ops/prometheus/alerts.yml").read_text())["groups"][0]["rules"]
OPERATIONS = (ROOT / "docs/operations.md").read_text()
DOCKERFILE = (ROOT / "Dockerfile").read_text()


def exposed() -> dict[str, set[str]]:
    """Labels of every series by its name, those that Prometheus makes itself included."""
    metrics = Metrics()
    found: dict[str, set[str]] = {"up": {"job", "instance"}, "process_resident_memory_bytes": set()}
    owners = [*vars(metrics).values(), *vars(JobMetrics(CollectorRegistry())).values()]
    for metric in owners:
        if isinstance(metric, MetricWrapperBase):
            described = next(iter(metric.describe()))
            endings = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(described.type, ("",))
            labels = {*metric._labelnames, "job", "instance"} | ({"le"} if isinstance(metric, Histogram) else set())
            found |= {described.name + ending: labels for ending in endings}
    return found


@pytest.mark.parametrize("query", [*QUERIES, *(rule["expr"] for rule in ALERTS)])
def test_every_query_names_metrics_and_labels_that_exist(query: str) -> None:
    there = exposed()
    named = re.findall(r"\b(headwater_\w+|process_\w+|up)\b", query)
    assert named
    assert set(named) <= there.keys()
    labels = {label.strip() for group in re.findall(r"by \(([^)]*)\)", query) for label in group.split(",")}
    labels |= {label for group in re.findall(r"\{([^}]*)\}", query) for label in re.findall(r"(\w+)=", group)}
    assert labels <= set.union(*(there[name] for name in named))


def test_every_metric_of_ours_is_explained() -> None:
    ours = {name for name in exposed() if name.startswith("headwater_")}
    bare = {re.sub(r"_(bucket|sum|count)$", "", name) for name in ours}
    assert {name for name in bare if f"`{name}" not in OPERATIONS} == set()


def test_every_problem_has_a_place_in_the_runbook() -> None:
    code = "".join(file.read_text() for file in (ROOT / "app").rglob("*.py"))
    slugs = set(re.findall(r"(?:Refusal\(|make\(|\()\s*[45]\d\d, \"([a-z-]+)\"", code))
    assert len(slugs) > 20
    assert [slug for slug in slugs if f"`{slug}`" not in OPERATIONS] == []


def test_every_alert_has_a_place_in_the_runbook() -> None:
    assert [rule["alert"] for rule in ALERTS if f"**{rule['alert']}**" not in OPERATIONS] == []


@pytest.mark.parametrize("name", SERVICES)
def test_what_a_service_waits_for_can_come_about(name: str) -> None:
    for other, how in SERVICES[name].get("depends_on", {}).items():
        waited_for = SERVICES[other]
        if how["condition"] == "service_healthy":
            assert "test" in waited_for["healthcheck"]
        if how["condition"] == "service_completed_successfully":
            assert waited_for["restart"] == "no"


def test_our_services_set_settings_that_exist() -> None:
    for service in (SERVICES[name] for name in OURS):
        assert {f"HEADWATER_{name.upper()}" for name in Settings.model_fields} >= service["environment"].keys()


def test_there_are_two_workers_and_one_folder_of_data() -> None:
    assert SERVICES["worker"]["deploy"]["replicas"] == 2
    assert all("data:/data" in SERVICES[name]["volumes"] for name in OURS)


def test_docker_waits_longer_than_the_service_takes_to_end() -> None:
    grace = Settings.model_fields["shutdown_grace_s"].default
    assert all(int(SERVICES[name]["stop_grace_period"].rstrip("s")) > grace + 5 for name in OURS)


def test_no_password_has_a_default() -> None:
    assert not re.findall(r"PASSWORD\s*:-", (ROOT / "docker-compose.yml").read_text())


def test_a_compose_client_accepts_the_file(tmp_path: Path) -> None:
    clients = [["docker", "compose"], ["docker-compose"]]
    for client in clients:  # where there is none, the tests above are what holds the file
        if shutil.which(client[0]) is None or subprocess.run([*client, "version"], capture_output=True).returncode:
            continue
        (tmp_path / ".env").write_text("POSTGRES_PASSWORD=a\nREDIS_PASSWORD=b\n")
        command = [*client, "--env-file", str(tmp_path / ".env"), "--file", str(ROOT / "docker-compose.yml"), "config"]
        done = subprocess.run([*command, "--quiet"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_the_image_runs_as_nobody_special_and_says_whether_it_is_well() -> None:
    users = re.findall(r"^USER (\S+)", DOCKERFILE, re.MULTILINE)
    assert users == ["10001"]
    assert re.search(r"^HEALTHCHECK (.|\\\n)*healthz", DOCKERFILE, re.MULTILINE)
    assert "--constraint constraints.txt" in DOCKERFILE


def test_what_the_image_copies_is_not_ignored() -> None:
    lines = re.findall(r"^COPY ([^-].*)", DOCKERFILE, re.MULTILINE)
    copied = {part for line in lines for part in line.split()[:-1]}
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert copied == kept
    assert all((ROOT / name).exists() for name in kept)
