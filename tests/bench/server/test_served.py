"""`afaspec bench --serve` and `--url` as the command line runs them, and their refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from bench.records.speeds import THROUGHPUT
from bench.report.files import read_report
from tests.command import run_command

ROOT = Path(__file__).parents[3]
PROMPTS, TOKENS = 4, 24


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = ["def add(a, b):", "class Parser:", "import os\nimport", "for line in file:"]
    rows = [{"prompt": text, "category": text.split()[0]} for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_one_command_serves_and_measures(prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = subprocess.run(
        [
            sys.executable, "-m", "afaspec", "bench", "embedded", "--serve", "together",
            "--draft", "base=embedded-draft", "--k", "2", "--prompts", str(prompts),
            "--max-tokens", str(TOKENS), "--ignore-eos", "--enforce-eager", "--rounds", "1",
            "--concurrency", "1", "--out", str(out),
        ],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    report = read_report(out / "report.json")
    assert [arm["name"] for arm in report.arms] == ["none", "base"]
    base, none = report.arm("base"), report.arm("none")
    spent = base["server_counters"]
    assert spent["requests"] == none["server_counters"]["requests"] == PROMPTS
    assert spent["tokens"] == none["server_counters"]["tokens"] == PROMPTS * TOKENS
    length = 1 + spent["accepted_tokens"] / spent["drafts"]
    assert length > 1.2
    assert base["acceptance_length"]["value"] == pytest.approx(length)
    assert [figure["value"] for figure in base["per_position"]] == pytest.approx(
        [count / spent["drafts"] for count in spent["accepted_per_position"]]
    )
    spread = base["accepted_lengths"]
    assert sum(spread["per_step"]) == spent["drafts"]
    assert len(spread["per_request"]) == PROMPTS
    assert set(base["categories"]) == {"def", "class", "import", "for"}
    for arm in report.arms:
        latency = arm["latency"]
        assert (latency["requests"], latency["failed"]) == (PROMPTS, 0)
        assert latency["ttft_ms"]["p50"] > 0
        for kind in ("ttft_ms", "tpot_ms", "itl_ms"):  # pieces read at once are 0 ms apart
            assert 0 <= latency[kind]["p50"] <= latency[kind]["p99"] <= latency["e2e_ms"]["p99"]
        assert arm[THROUGHPUT.speedup]["value"] == pytest.approx(
            arm[THROUGHPUT.rate]["value"] / none[THROUGHPUT.rate]["value"]
        )
        assert not [line for line in arm["warnings"] if "server" in line]
    # an answer that parts from the plain one is explained by what the plain server computes
    differing = base["lossless"]["differences"]
    assert base["lossless"]["matching"] + len(differing) == PROMPTS
    assert all(found["near_tie"] for found in differing)
    assert base["provenance"]["method"] == "eagle3"
    assert {arm["provenance"]["model"] for arm in report.arms} == {"embedded"}
    assert 1 <= report.provenance["threads"] <= report.provenance["machine"]["cores"]
    assert none["provenance"]["method"] is None
    urls = {arm["provenance"]["server"].rsplit(":", 1)[1] for arm in report.arms}
    listening = {str(c.laddr.port) for c in psutil.net_connections() if c.status == "LISTEN"}
    assert len(urls) == 2
    assert not urls & listening


class NotVllm(BaseHTTPRequestHandler):
    """An OpenAI server that is not vLLM: it has no /metrics."""

    def do_GET(self) -> None:
        known = self.path == "/v1/models"
        self.send_response(200 if known else 404)
        self.end_headers()
        if known:
            self.wfile.write(json.dumps({"data": [{"id": "other"}]}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def not_vllm() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), NotVllm) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_a_server_that_answers_no_request_is_one_error(
    not_vllm: str, prompts: Path, tmp_path: Path
) -> None:
    asked = ("bench", "--prompts", prompts, "--out", tmp_path, "--url")
    code, error = run_command(*asked, f"x={not_vllm}")
    assert code == 2
    assert "nobody counts its drafts and requests" in " ".join(error.split())
    assert "every request to 'x' failed; the first: HTTP 501" in " ".join(error.split())
    assert not list(tmp_path.glob("turns-*"))  # no turn has ended: there is nothing to go on with
    code, error = run_command(*asked, not_vllm, "--model", "mine")
    assert "serves no model 'mine'; it has other" in " ".join(error.split())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--url", "x=http://127.0.0.1:9"], "no server answers here"),
        (["--url", "a=http://h:1", "--url", "a=http://h:2"], "two servers have the name 'a'"),
        (["--url", "nonsense"], "cannot read the server"),
        (["--url", "a=http://h:1", "--serve", "together"], "exclude each other"),
        (["embedded", "--serve", "sideways"], "--serve is 'sideways'"),
        (["embedded", "--request-rate", "1"], "--request-rate is for servers only"),
        (["embedded", "--concurrency", "1,4"], "concurrency is '1,4'"),
        (["embedded", "--serve", "together", "--engines", "in-turn"], "--engines is for engines"),
        (["--url", "a=http://h:1", "--tensor-parallel", "2"], "--tensor-parallel is for engines"),
        (["--url", "a=http://h:1", "--ngram"], "--ngram is for engines and servers that are"),
        (["--url", "a=http://h:1", "--draft", "a=mtp"], "how the server 'a' drafts is set where"),
        (["--url", "a=http://h:1", "--draft", "a=embedded-draft,k=5"], "how the server 'a' drafts"),
        (["embedded", "--serve", "in-turn", "--server-args", "'"], "cannot read --server-args"),
        (["--url", "a=http://h:1", "--truncate-prompts"], "tokenizer only"),
        ([], "TARGET is missing"),
    ],
)
def test_bad_input(arguments: list[str], said: str, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, error = run_command("bench", *arguments, "--prompts", prompts, "--out", out)
    assert code == 2
    assert said in " ".join(error.split())
    assert not out.exists()
