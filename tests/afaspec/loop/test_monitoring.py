"""docs/monitoring in a real Prometheus: its rules load and fire, its queries have answers."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, Counter, Gauge

from afaspec.loop.metrics import WatchMetrics, serve_page
from afaspec.loop.watch import Figures, Look
from serving.traffic.acceptance import ACCEPTED, DRAFTS

ROOT = Path(__file__).parents[3]
FILES = ROOT / "docs" / "monitoring"


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with `prometheus` and `promtool`: this machine's, else out of Debian's package."""
    if found := shutil.which("prometheus"):
        return Path(found).parent
    folder = tmp_path_factory.mktemp("prometheus")
    fetch = [sys.executable, str(ROOT / "tools" / "get_prometheus.py"), str(folder)]
    done = subprocess.run(fetch, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no Prometheus here, and none can be fetched: {done.stderr.strip()[-200:]}")
    return Path(done.stdout.strip())


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def look(at: float, *, dropped: bool, recent: float) -> Look:
    figures = Figures(recent, 2.1, 1.2 if dropped else 0.2, dropped)
    return Look(
        at=at, seconds=5.0, requests=3, tokens=300, drafts=200, accepted=100, counts={},
        per_position=(0.5, 0.3, 0.1), all=figures, tags={"code": figures}, version=2,
    )  # fmt: skip


@contextmanager
def prometheus(programs: Path, folder: Path, targets: list[int]) -> Iterator[str]:
    """One that runs with our configuration, at these ports in place of the documented ones."""
    for name in ("prometheus.yml", "alerts.yml"):
        shutil.copy(FILES / name, folder)
    config = yaml.safe_load((folder / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    for job, port in zip(config["scrape_configs"], targets, strict=True):
        job["static_configs"] = [{"targets": [f"127.0.0.1:{port}"]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    url = f"127.0.0.1:{free_port()}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [programs / "prometheus", f"--config.file={folder / 'prometheus.yml'}",
             f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={url}",
             f"--web.console.libraries={folder}", f"--web.console.templates={folder}"],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield f"http://{url}"
    finally:
        process.kill()
        process.wait()


def ask(url: str, path: str, **parameters: str) -> Any:
    with urllib.request.urlopen(f"{url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}") as got:
        return json.load(got)["data"]


def eventually(look_for: Any, seconds: float = 60.0) -> Any:
    """What `look_for` finds, once it finds something."""
    end = time.monotonic() + seconds
    while True:
        try:
            if found := look_for():
                return found
        except OSError:
            pass
        assert time.monotonic() < end, "not in time"
        time.sleep(0.2)


def server_page(port: int) -> tuple[Counter, Counter, Counter, Counter]:
    """What the dashboard reads of a server's own page."""
    registry = CollectorRegistry()
    by_tag = [
        Counter(name, "as the server counts", ["route", "tag"], registry=registry)
        for name in (DRAFTS, ACCEPTED)
    ]
    tokens = Counter("vllm:generation_tokens", "as vLLM counts", registry=registry)
    swaps = Counter("afaspec:draft_swaps", "as the server counts", registry=registry)
    Gauge("afaspec:draft_version", "", ["draft"], registry=registry).labels(draft="abc").set(2)
    serve_page(registry, port)
    return by_tag[0], by_tag[1], tokens, swaps


def queries() -> list[str]:
    dashboard = json.loads((FILES / "grafana.json").read_text())
    panels = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    return panels + [one["expr"] for one in dashboard["annotations"]["list"]]


def test_rules_and_configuration_are_right(programs: Path) -> None:
    for check in (["rules", "alerts.yml"], ["config", "prometheus.yml"]):
        done = subprocess.run(
            [programs / "promtool", "check", *check], cwd=FILES, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_alerts_fire_and_every_query_of_the_dashboard_is_answered(
    programs: Path, tmp_path: Path
) -> None:
    ports = [free_port(), free_port()]
    drafts, accepted, tokens, swaps = server_page(ports[0])
    watch = WatchMetrics(ports[1], step_cost=1.9)
    watch.show(look(time.time(), dropped=False, recent=2.1))

    def count() -> None:
        drafts.labels("/v1/completions", "code").inc(100)
        accepted.labels("/v1/completions", "code").inc(60)
        tokens.inc(160)
        swaps.inc(0)

    with prometheus(programs, tmp_path, ports) as url:

        def firing() -> set[str]:
            count()
            found = ask(url, "alerts")["alerts"]
            return {one["labels"]["alertname"] for one in found if one["state"] == "firing"}

        def answered(query: str) -> bool:
            count()
            return bool(ask(url, "query", query=query)["result"])

        eventually(lambda: answered("afaspec:drift_called"))
        assert firing() == set()
        watch.show(look(time.time(), dropped=True, recent=1.6))
        assert eventually(firing) == {"AfaspecAcceptanceFell"}
        for query in queries():
            # A rate has to have seen two values. An annotation's query finds nothing while the
            # version stays: that it is one is enough.
            assert "changes(" in query or eventually(lambda asked=query: answered(asked)), query
            ask(url, "query", query=query)
        (by_tag,) = ask(url, "query", query=next(q for q in queries() if "by (tag)" in q))["result"]
        assert float(by_tag["value"][1]) == pytest.approx(1.6)
        (speedup,) = ask(url, "query", query="afaspec:speedup_estimated")["result"]
        assert float(speedup["value"][1]) == pytest.approx(1.6 / 1.9)
        pending = eventually(
            lambda: {
                one["labels"]["alertname"]
                for one in ask(url, "alerts")["alerts"]
                if one["state"] == "pending"
            }
        )
        assert pending == {"AfaspecDraftCostsTime"}


def test_a_watch_that_sees_nothing_is_told(programs: Path, tmp_path: Path) -> None:
    """By the rules' own test bench, which makes the time pass."""
    (tmp_path / "alerts.yml").write_text((FILES / "alerts.yml").read_text())
    (tmp_path / "test.yml").write_text(
        yaml.safe_dump({
            "rule_files": ["alerts.yml"],
            "tests": [{
                "interval": "1m",
                "input_series": [
                    {"series": "afaspec:looked_at_seconds", "values": "0 60 60x10"},
                    {"series": "afaspec:speedup_estimated", "values": "0.9x20"},
                ],
                "alert_rule_test": [
                    {"eval_time": "1m", "alertname": "AfaspecNotLooking", "exp_alerts": []},
                    {"eval_time": "6m", "alertname": "AfaspecNotLooking", "exp_alerts": [{
                        "exp_labels": {"severity": "warning"},
                        "exp_annotations": {
                            "summary": "Nobody has seen this server's counters for 5m 0s",
                            "description": "The server, or the watch, is gone.",
                        },
                    }]},
                ],
            }],
        })
    )  # fmt: skip
    done = subprocess.run(
        [programs / "promtool", "test", "rules", "test.yml"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
