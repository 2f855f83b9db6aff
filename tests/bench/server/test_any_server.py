"""Servers that count nothing, refuse, reason, go away or want a key, and what requests can say."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bench.records.run import Answer, Block
from bench.records.speeds import THROUGHPUT
from bench.records.turns import forget_turns
from bench.report.schema import Report
from bench.server.arrivals import Load
from bench.server.checks import warnings_of
from bench.server.config import ServerConfig
from bench.server.measure import LoadRun
from bench.server.run import run_server_bench
from bench.stats.latency import arrival_figures, goodput_figures
from drafts.errors import UserError
from serving.metrics import ServerCounters, SpecCounters
from serving.remote import RemoteServer
from tests.bench.server.stand_in import NEXT, TOKENS, StandIn
from tests.command import run_command

SELF_SIGNED = ("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
               "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1")  # fmt: skip


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    rows = ({"messages": [{"role": "user", "content": text}]} for text in ("one", "two", "three"))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(prompts: Path, **settings: Any) -> ServerConfig:
    few: dict[str, Any] = {"max_tokens": TOKENS, "rounds": 2, "warmup": 1, "requests": 3}
    return ServerConfig(prompts=str(prompts), **few | settings)


def bench(server: StandIn, prompts: Path, name: str = "mine", **settings: Any) -> Report:
    with server.serve() as running:
        return run_server_bench(config(prompts, **settings), {name: running.url})


def test_a_server_that_counts_nothing_is_measured_and_it_is_said(prompts: Path) -> None:
    (arm,) = bench(StandIn(counted=False), prompts).arms
    assert arm["acceptance_length"] is None
    assert arm["server_counters"] is None
    assert arm["provenance"]["method"] == "not known"
    assert arm[THROUGHPUT.rate]["value"] > 0
    assert any("nobody counts its drafts" in line for line in arm["warnings"])
    assert not any("only what its name says" in line for line in arm["warnings"])


def test_which_server_drafts_nothing_is_told_by_its_name_where_nobody_counts(prompts: Path) -> None:
    with StandIn(counted=False).serve() as none, StandIn(counted=False).serve() as mine:
        report = run_server_bench(config(prompts), {"none": none.url, "mine": mine.url})
    assert [arm["provenance"]["method"] for arm in report.arms] == [None, "not known"]
    assert report.arm("mine")[THROUGHPUT.speedup]["value"] > 0
    assert any("only what its name says" in line for line in report.arm("none")["warnings"])


def test_answers_bring_acceptance_where_no_page_does(prompts: Path) -> None:
    """One step of nothing, two of one token and one of all three."""
    (arm,) = bench(StandIn(counted=False, accepts=[1, 2, 0, 1]), prompts).arms
    assert arm["acceptance_length"]["value"] == pytest.approx(1 + 5 / 4)
    assert [position["value"] for position in arm["per_position"]] == [0.75, 0.25, 0.25]


def test_pages_of_several_engines_add_up(prompts: Path) -> None:
    """Behind a router that has no counters of its own; each of two engines counts all."""
    router, engine = StandIn(counted=False), StandIn()
    second = StandIn(asked=router.asked)
    engine.asked = router.asked  # each counts what the router was asked
    with router.serve() as front, engine.serve() as behind, second.serve() as too:
        page, other = (f"mine={one.url}/metrics" for one in (behind, too))
        (once,) = run_server_bench(config(prompts, metrics_url=[page]), {"mine": front.url}).arms
        (twice,) = run_server_bench(
            config(prompts, metrics_url=[page, other]), {"mine": front.url}
        ).arms
        (nobody,) = run_server_bench(
            config(prompts, metrics_url=["mine=none"]), {"mine": behind.url}
        ).arms
        with pytest.raises(UserError, match="there is no server 'yours': they are mine"):
            run_server_bench(config(prompts, metrics_url=["yours=none"]), {"mine": behind.url})
        with pytest.raises(UserError, match="none of vLLM's counters"):
            run_server_bench(
                config(prompts, metrics_url=[f"mine={front.url}/health"]), {"mine": front.url}
            )
    assert once["server_counters"]["requests"] == 6
    assert twice["server_counters"]["requests"] == 12
    assert any("ended 12 requests, of which 6 were ours" in line for line in twice["warnings"])
    assert nobody["server_counters"] is None


def test_what_requests_say(prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    server = StandIn()
    body = {"top_p": 0.9, "stop": ["###"], "chat_template_kwargs": {"enable_thinking": False}}
    report = bench(
        server, prompts, key=["mine=MY_KEY"], header=["X-Tenant: a: b"], request_body=body,
        request_seeds=True, temperature=0.5, warmup=1,
    )  # fmt: skip
    for asked, headers in zip(server.asked, server.headers, strict=True):
        assert {name: asked[name] for name in body} == body
        assert headers["authorization"] == "Bearer secret"
        assert headers["x-tenant"] == "a: b"
    measured = [asked["seed"] for asked in server.asked[1:]]
    assert measured == list(range(6))  # two rounds of three prompts
    (arm,) = report.arms
    assert arm["provenance"]["sampling"]["top_p"] == 0.9
    assert arm["provenance"]["headers"] == ["X-Tenant"]
    assert "secret" not in json.dumps(report.as_json())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--key", "mine=NO_SUCH_VARIABLE"], "the environment has no NO_SUCH_VARIABLE"),
        (["--key", "mine"], "cannot read 'mine'"),
        (["--header", "no colon"], "cannot read the header"),
        (["--header", "Authorization: Bearer x"], "seen by all of the machine"),
        (["--metrics-url", "mine=host:1"], "cannot read the address 'host:1'"),
        (["--request-body", '{"stream": false}'], "sets 'stream'"),
        (["--request-body", '{"temperature": 1}'], "use --temperature"),
        (["--request-body", "[1]"], "not a JSON object"),
        (["--slo", "ttft:fast"], "cannot read the limit 'ttft:fast'"),
        (["--slo", "itl:5"], "there are ttft, ttfa, tpot, e2e"),
        (["--serve", "together", "--key", "mine=HOME"], "exclude each other"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_one_clear_error_before_anything_is_asked(
    flags: list[str], says: str, prompts: Path, tmp_path: Path
) -> None:
    server = StandIn()
    with server.serve() as running:
        code, said = run_command(
            "bench", "--url", f"mine={running.url}", "--prompts", prompts, "--out", tmp_path, *flags
        )
    assert code == 2
    assert says in " ".join(said.split())
    assert server.asked == []


def test_a_refused_request_is_sent_again(prompts: Path) -> None:
    (arm,) = bench(StandIn(refuses=2), prompts, retries=3).arms
    assert arm["latency"]["failed"] == 0
    with pytest.raises(UserError, match="HTTP 429"):
        bench(StandIn(refuses=2), prompts)
    refusing = StandIn()
    with refusing.serve() as running:
        one = config(prompts, retries=1, rounds=1, warmup=0)
        refusing.refuses = 1
        (arm,) = run_server_bench(one, {"mine": running.url}).arms
    said = [line for line in arm["warnings"] if "refused at first" in line]
    assert said == [
        "mine at concurrency 1: 1 of 3 requests were refused at first and sent again; their times "
        "count from the first attempt"
    ]


def test_without_a_warm_up_nothing_else_is_asked(prompts: Path) -> None:
    server = StandIn()
    bench(server, prompts, warmup=0)
    assert len(server.asked) == 2 * 3  # rounds, requests


def test_the_answer_behind_the_reasoning(prompts: Path) -> None:
    (arm,) = bench(StandIn(reasons=True), prompts).arms
    later = arm["latency"]["ttfa_ms"]["mean"] - arm["latency"]["ttft_ms"]["mean"]
    assert later > 0
    assert arm["latency"]["e2e_ms"]["mean"] >= arm["latency"]["ttfa_ms"]["mean"] + 900 * NEXT - 5
    (plain,) = bench(StandIn(), prompts).arms
    assert plain["latency"]["ttfa_ms"] is None
    assert plain["tokens_per_piece"] == TOKENS / 3


def answer(intended: float, took: float, tokens: int = 11, error: str | None = None) -> Answer:
    return Answer(intended, intended, [intended + took / 2, intended + took], tokens, error=error)


def test_goodput_counts_what_kept_within_all_limits() -> None:
    took = [0.2, 0.4, 0.8]
    answers = [answer(0.0, seconds) for seconds in took] + [answer(0.0, 0.1, error="HTTP 500: no")]
    found = goodput_figures([Block(2.0, 0.0, answers)], {"ttft": 200.0, "tpot": 20.0})
    assert found["share"] == 0.5  # 100 ms and 10 ms, 200 ms and 20 ms; not 400 ms; not the failed
    assert found["requests_per_second"] == 1.0


def test_a_server_that_does_not_keep_up_and_a_long_end_are_named() -> None:
    def run(took: list[float], wall: float) -> LoadRun:
        server = RemoteServer("http://far:1", "m", "m", 512, None, 0)
        found = LoadRun("mine", server, Load(rate=2.0), len(took))
        block = Block(wall, 0.001, [answer(i / 2, seconds) for i, seconds in enumerate(took)])
        none = SpecCounters(0, 0, 0, ())
        found.rounds = [[block]]
        found.counters = [[ServerCounters(len(took), 11 * len(took), none)]]
        return found

    steady = run([1.0] * 24, 12.5)
    assert arrival_figures(steady.blocks, 2.0) == pytest.approx(
        {"asked": 2.0, "sent": 2.0, "drain": 1 - 11.5 / 12.5, "slowdown": 1.0}
    )
    assert warnings_of(steady) == []
    growing = warnings_of(run([1.0 + i / 4 for i in range(24)], 18.0))
    assert [("keep up" in line, "arrived any more" in line) for line in growing] == [
        (True, False), (False, True),
    ]  # fmt: skip


def test_tls_by_the_systems_certificates(prompts: Path, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run([*SELF_SIGNED, "-keyout", key, "-out", certificate], check=True,
                   capture_output=True)  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with StandIn().serve(context=context) as running:
        with pytest.raises(UserError, match="CERTIFICATE_VERIFY_FAILED"):
            run_server_bench(config(prompts), {"mine": running.url})
        command = [
            sys.executable, "-m", "afaspec", "bench", "--url", f"mine={running.url}", "--prompts",
            str(prompts), "--out", str(tmp_path / "out"), "--max-tokens", str(TOKENS),
        ]  # fmt: skip
        trusting = os.environ | {"SSL_CERT_FILE": str(certificate)}
        done = subprocess.run(command, capture_output=True, text=True, env=trusting)
    assert done.returncode == 0, done.stderr
    (arm,) = json.loads((tmp_path / "out" / "report.json").read_text())["arms"]
    assert arm["latency"]["failed"] == 0


def test_a_killed_run_goes_on_with_the_turns_that_ended(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    server, other = StandIn(), StandIn()
    with server.serve() as one, other.serve() as two:
        command = [
            sys.executable, "-m", "afaspec", "bench", "--url", f"one={one.url}",
            "--url", f"two={two.url}", "--prompts", str(prompts), "--out", str(out),
            "--max-tokens", str(TOKENS), "--rounds", "6", "--warmup", "1", "--requests", "3",
        ]  # fmt: skip
        begun = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        (file,) = wait_for(lambda: list(out.glob("turns-*.jsonl")))
        wait_for(lambda: len(file.read_text().splitlines()) > 4)  # the first line, four turns
        begun.send_signal(signal.SIGKILL)
        begun.wait()
        with file.open("ab") as torn:
            torn.write(b'{"key": [0, 5, "on')
        ended = len(file.read_text().splitlines()) - 2
        changed = subprocess.run([*command, "--temperature", "0.5"], capture_output=True, text=True)
        assert changed.returncode == 2
        assert "temperature was 0.0" in " ".join(changed.stderr.split())
        before = len(server.asked) + len(other.asked)
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert f"{ended} turns were measured before" in " ".join(done.stderr.split())
    asked = len(server.asked) + len(other.asked) - before
    assert asked == 2 + 3 * (2 * 6 - ended)  # warm-ups, and three prompts a turn
    report = json.loads((out / "report.json").read_text())
    assert [arm["latency"]["requests"] for arm in report["arms"]] == [18, 18]
    assert report["provenance"]["turns_of_an_interrupted_run"] == ended
    assert not list(out.glob("turns-*"))


def test_a_server_that_comes_back_is_asked_again(prompts: Path, tmp_path: Path) -> None:
    """It goes away in the midst of a turn, and loses its counts."""
    server, notes = StandIn(), list[str]()
    running = server.serve()
    running.__enter__()
    port, reports = int(running.url.rpartition(":")[2]), list[Report]()
    one = config(prompts, rounds=6, patience=30.0)

    def run() -> None:
        reports.append(
            run_server_bench(one, {"mine": running.url}, note=notes.append, keep=tmp_path)
        )

    client = threading.Thread(target=run)
    client.start()
    wait_for(lambda: len(server.asked) > 5)
    running.__exit__()
    again = StandIn()
    time.sleep(0.3)
    with again.serve(port):
        client.join(60)
    ((arm,),) = (report.arms for report in reports)
    assert (arm["latency"]["requests"], arm["latency"]["failed"]) == (18, 0)
    assert any("a turn was asked again" in line for line in arm["warnings"])
    assert notes
    forget_turns(tmp_path)
    assert not list(tmp_path.glob("turns-*"))


def test_a_server_that_stays_away_is_one_error(prompts: Path) -> None:
    server = StandIn()
    running = server.serve()
    running.__enter__()
    failed = list[UserError]()
    one = config(prompts, rounds=20, patience=0.5)

    def run() -> None:
        with pytest.raises(UserError) as error:
            run_server_bench(one, {"mine": running.url})
        failed.append(error.value)

    client = threading.Thread(target=run)
    client.start()
    wait_for(lambda: len(server.asked) > 2)
    running.__exit__()
    client.join(60)
    assert "did not come back in 0.5 seconds" in failed[0].problem
    assert "the same command goes on" in str(failed[0].hint)


def wait_for(found: Any, seconds: float = 120.0) -> Any:
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, "not in time"
        time.sleep(0.02)
    return value


def test_loads_that_are_alike_are_each_measured(prompts: Path) -> None:
    server = StandIn()
    report = bench(server, prompts, loads=(Load(concurrency=1), Load(concurrency=1)), rounds=1)
    assert len(server.asked) == 2 * (1 + 3)  # a warm-up and three prompts each
    assert report.load
    times = [step["arms"][0]["latency"]["e2e_ms"]["mean"] for step in report.load]
    assert times[0] != times[1]
