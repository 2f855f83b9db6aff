"""`afaspec serve` with real vLLM: requests, and every way to end it."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from serving.metrics import counters_from_prometheus
from tests.serving.servers import FAST, Command, get, post, serving

K = 2


@pytest.fixture(scope="module")
def server(
    tiny_target: Path, tiny_draft: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Command]:
    arguments = [str(tiny_target), "--draft", str(tiny_draft), "--k", str(K), "--port", "0"]
    passed_on = ["--served-model-name", "tiny", *FAST]
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, *arguments, "--", *passed_on) as command:
        command.wait_ready()
        yield command
        assert len(command.children()) >= 4
        command.process.send_signal(signal.SIGTERM)
        assert command.process.wait(timeout=60) == 128 + signal.SIGTERM
        assert "acceptance length" in command.err
        command.assert_all_ended(seconds=1)


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
    arguments = [str(tiny_target), "--draft", str(tiny_draft), "--port", "0", "--", *FAST]
    with serving(tmp_path, *arguments) as command:
        command.wait_for_engine()
        command.process.send_signal(number)
        assert command.process.wait(timeout=30) == status
        command.assert_all_ended()


def test_a_flag_vllm_does_not_know_shows_its_complaint(tiny_target: Path, tmp_path: Path) -> None:
    with serving(tmp_path, str(tiny_target), "--port", "0", "--", "--no-such-flag") as command:
        assert command.process.wait(timeout=120) == 2
        assert "Error:" in command.err
        assert "--no-such-flag" in command.err
        assert "Traceback" not in command.err
        command.assert_all_ended()
