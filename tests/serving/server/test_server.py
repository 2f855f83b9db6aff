"""`afaspec serve` with real vLLM: requests, and every way to end it."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from afaspec.store.read import FeatureStore
from bench.records.run import Answer, Block
from bench.server.arrivals import Load
from bench.server.checks import warnings_of
from bench.server.config import ServerConfig
from bench.server.measure import LoadRun, measure_servers
from bench.server.run import prepare, run_server_bench
from drafts.errors import UserError
from drafts.target.info import read_target
from serving.metrics import counters_from_prometheus, sum_counters
from serving.remote import connect
from serving.runtime import counts_requests
from tests.opened import load_target_head
from tests.serving.server.servers import FAST, Command, get, post, serving
from tests.tiny.models import write_target
from tests.tiny.store import write_store
from tests.vllm_client import VllmWorker

K = 2


@pytest.fixture(scope="module")
def server(
    tiny_target: Path, tiny_draft: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Command]:
    arguments = [str(tiny_target), "--draft", str(tiny_draft), "--k", str(K), "--port", "0"]
    passed_on = ["--served-model-name", "tiny", "--dtype", "float32", *FAST]
    if counts_requests():
        passed_on += ["--per-request-spec-decode-metrics", "summary"]
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, *arguments, "--", *passed_on) as command:
        command.wait_ready()
        yield command
        assert len(command.children()) >= 4
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(timeout=120) == 128 + signal.SIGTERM
        assert "acceptance length" in command.err
        command.assert_all_ended()


@pytest.fixture(scope="module")
def url(server: Command) -> str:
    found = re.search(r"http://127\.0\.0\.1:\d+", server.out)
    assert found is not None
    return found[0]


def test_serve_says_what_it_does(server: Command) -> None:
    for words in ("vocabulary", "hidden size", "layer ids", "rope", "dtype", "method", "Ready"):
        assert words in server.err


def test_printed_curl_line_works(server: Command) -> None:
    line = next(line for line in server.out.splitlines() if line.startswith("curl"))
    assert '"model": "tiny"' in line
    answer = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=60)
    completion = json.loads(answer.stdout)
    assert completion["usage"]["completion_tokens"] > 0
    assert completion["choices"][0]["text"]


def test_flags_after_the_dashes_reach_vllm(url: str) -> None:
    model = json.loads(get(f"{url}/v1/models"))["data"][0]
    assert model["id"] == "tiny"
    assert model["max_model_len"] == 256


def test_metrics_count_the_speculation(url: str) -> None:
    before = counters_from_prometheus(get(f"{url}/metrics"))
    body = {"model": "tiny", "prompt": [5, 6, 7, 8], "max_tokens": 40, "temperature": 0}
    post(f"{url}/v1/completions", body | {"ignore_eos": True})
    spent = counters_from_prometheus(get(f"{url}/metrics")) - before
    assert 0 < spent.drafts <= 40
    assert 0 < spent.draft_tokens <= K * spent.drafts
    assert len(spent.accepted_per_position) == K
    assert sum(spent.accepted_per_position) == spent.accepted_tokens
    # One token comes from the prompt's own step, the others from speculative steps.
    assert abs(spent.drafts + spent.accepted_tokens - 39) <= K


def test_chat_uses_the_targets_template(url: str) -> None:
    messages = [{"role": "user", "content": "hello"}]
    body = {"model": "tiny", "messages": messages, "max_tokens": 4, "temperature": 0}
    answer = post(f"{url}/v1/chat/completions", body)
    assert answer["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 128 + signal.SIGINT), (signal.SIGKILL, -signal.SIGKILL)],
)
def test_no_process_is_left_when_it_ends_while_vllm_starts(
    number: int, status: int, tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    log = ["--log", str(tmp_path / "server.log")]
    arguments = [str(tiny_target), "--draft", str(tiny_draft), "--port", "0", *log]
    with serving(tmp_path, *arguments) as command:
        command.wait_for_engine()
        command.process.send_signal(number)
        assert command.process.wait(timeout=120) == status
        command.assert_all_ended()


def test_a_bench_run_counts_what_the_server_counts(
    url: str,
    tiny_target: Path,
    tiny_draft: Path,
    vllm_worker: VllmWorker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same server as two arms: exact counts, and the outputs of an engine in process."""
    monkeypatch.setattr("bench.server.measure.PAUSE_SECONDS", 0)
    tokens, prompts = 12, ["def add(a, b):", "class Parser:", "import os"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in prompts))
    loads = (Load(concurrency=2), Load(rate=20.0))
    config = ServerConfig(
        prompts=str(file), target=read_target(tiny_target), loads=loads, requests=6,
        max_tokens=tokens, rounds=2, ignore_eos=True, warmup=1,
    )  # fmt: skip
    servers = {"first": connect(url), "second": connect(f"{url}/v1/")}
    assert servers["first"].k == K
    assert servers["first"].max_model_len == 256
    requests = prepare(config, list(servers.values()))
    results = measure_servers(config, servers, requests)
    ids = [request.prompt for request in requests]
    expected = vllm_worker.serve(tiny_target, tiny_draft, K, ids, tokens)
    for run in (run for runs in results for run in runs):
        assert len(run.good) == 12
        assert sum(spent.tokens for spent in run.spent) == 12 * tokens
        by_block = sum_counters([spent.spec for spent in run.spent])
        assert by_block is not None
        assert by_block.drafts > 0
        by_request = [a.counters for a in run.good if a.counters is not None]
        assert sum_counters(by_request) == (by_block if counts_requests() else None)
        outputs = [list(answer.token_ids or []) for answer in run.answers]
        assert outputs == 4 * [one["output"] for one in expected["runs"]]
        assert [answer.tokens for answer in run.answers] == [tokens] * 12
        assert not [line for line in warnings_of(run) if "server" in line]


def test_texts_are_sent_where_there_is_no_target(url: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "import os"}, {"messages": [{"role": "user", "content": "hello"}]}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = ServerConfig(prompts=str(file), max_tokens=4, rounds=1, ignore_eos=True)
    report = run_server_bench(config, {"mine": url})
    (arm,) = report.arms
    assert arm["latency"]["failed"] == 0
    assert arm["server_counters"]["tokens"] == 4 * 4  # each prompt twice, for four requests
    assert arm["acceptance_length"]["value"] >= 1
    assert arm["provenance"]["k"] == K
    assert arm["provenance"]["model"] == "tiny"


def test_other_traffic_is_noticed(url: str, tmp_path: Path) -> None:
    server = connect(url)
    before = server.counters()
    post(f"{url}/v1/completions", {"model": "tiny", "prompt": [5, 6], "max_tokens": 3})
    spent = server.settled_counters(before.requests + 1) - before
    answer = Answer(0.0, 0.0, [0.1], tokens=1)
    run = LoadRun("mine", server, Load(concurrency=1), 1)
    run.rounds, run.counters = [[Block(1.0, 0.0, [answer, answer])]], [[spent]]
    assert any("ended 1 requests, of which 2 were ours" in line for line in warnings_of(run))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "other"}, "serves no model 'other'; it has tiny"),
        ({"max_tokens": 250}, "has room for 256"),
        ({"requests": 2, "loads": (Load(concurrency=4),)}, "cannot run 4 at once"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_any_load(
    url: str, tiny_target: Path, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "import os, sys, re, json, math, time"}) + "\n")
    settings: dict[str, Any] = {"prompts": str(file), "target": read_target(tiny_target), **change}
    before = connect(url).counters()
    with pytest.raises(UserError, match=said):
        run_server_bench(ServerConfig(**settings), {"mine": url})
    assert connect(url).counters() == before


def test_a_server_of_another_model_is_refused(url: str, tmp_path: Path) -> None:
    other = write_target(tmp_path / "other", vocab=400)
    file = tmp_path / "prompts.jsonl"
    file.write_text(json.dumps({"prompt": "import os"}) + "\n")
    with pytest.raises(UserError, match="whose tokens are not those of"):
        run_server_bench(ServerConfig(prompts=str(file), target=read_target(other)), {"mine": url})


def test_it_writes_the_answers_of_a_capture(
    url: str, tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    """What vLLM says greedily, speculation and all, is what the target's own states say."""
    store = FeatureStore.open(
        write_store(
            tmp_path / "store", tiny_target, tiny_draft, 12, generate_with=url, dtype="float32"
        )
    )
    head, likeliest, written = load_target_head(tiny_target).float(), 0, 0
    for sequence in store:
        places = sequence.loss_mask.nonzero()[:, 0]
        said = head(sequence.final[places - 1].float()).argmax(-1)
        likeliest += int((said == sequence.input_ids[places]).sum())
        written += len(places)
    assert len(store) == 12
    assert likeliest > 0.97 * written > 100  # states are kept in bf16, so that near-ties may fall

    other = write_target(tmp_path / "other", vocab=400)
    with pytest.raises(UserError, match="whose tokens are not those of"):
        write_store(tmp_path / "no", other, None, 3, generate_with=url, layer_ids="1,2,3")
