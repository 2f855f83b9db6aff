"""Collecting from real vLLM servers, inside one and before one, with real clients."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bench.prompts.read import read_prompts
from bench.records.settings import PromptSettings
from serving.metrics import server_counters
from serving.runtime import counts_requests
from serving.traffic.shards import Traffic
from tests.serving.server.servers import FAST, ROOT, get, serving

Json = dict[str, Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("collect") / "traffic"


@pytest.fixture(scope="module")
def url(tiny_target: Path, tiny_draft: Path, folder: Path) -> Iterator[str]:
    """A server that keeps every request, and the version of its draft with it."""
    arguments = [str(tiny_target), "--draft", str(tiny_draft), "--k", "2", "--port", "0"]
    keep = ["--collect", str(folder), "--sample-rate", "1", "--redact", "secret-[0-9]+"]
    passed_on = ["--served-model-name", "tiny", "--dtype", "float32", *FAST]
    with serving(folder.parent, *arguments, *keep, "--swappable", "--", *passed_on) as command:
        command.wait_ready()
        found = re.search(r"http://127\.0\.0\.1:\d+", command.out)
        assert found is not None
        yield found[0]


def ask(url: str, route: str, body: Json, **headers: str) -> bytes:
    request = urllib.request.Request(
        url + route,
        json.dumps({"model": "tiny", "temperature": 0, "max_tokens": 12, **body}).encode(),
        {
            "Content-Type": "application/json",
            **{k.replace("_", "-"): v for k, v in headers.items()},
        },
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        whole: bytes = answer.read()
        return whole


def rows(folder: Path, count: int) -> list[Json]:
    """The last `count` rows, once nothing more is being written."""
    deadline = time.monotonic() + 30
    found: list[Json] = []
    while time.monotonic() < deadline:
        found = [*Traffic(folder).rows()]
        time.sleep(0.3)
        if found and found == [*Traffic(folder).rows()] and len(found) >= count:
            break
    return found[-count:]


CHAT = {"messages": [{"role": "user", "content": "say secret-12345 now"}]}


def test_a_server_keeps_what_it_was_asked_and_said(url: str, folder: Path, tmp_path: Path) -> None:
    whole = json.loads(ask(url, "/v1/chat/completions", CHAT, x_afaspec_tag="team-a"))
    ask(url, "/v1/chat/completions", CHAT | {"stream": True}, x_afaspec_tag="team-b")
    ask(url, "/v1/completions", {"prompt": "def f(x):"})
    chat, streamed, completion = rows(folder, 3)
    assert chat["id"] == whole["id"]
    message = chat["response"]["choices"][0]["message"]
    assert message["content"] == whole["choices"][0]["message"]["content"]
    assert streamed["response"]["choices"][0]["message"]["content"] == message["content"]
    assert completion["request"]["prompt"] == "def f(x):"
    assert (chat["tag"], streamed["tag"], completion.get("tag")) == ("team-a", "team-b", None)
    assert [row["draft_version"] for row in (chat, streamed, completion)] == [1, 1, 1]
    assert chat["request"]["messages"][0]["content"] == "say [redacted] now"
    if counts_requests():
        assert sum(chat["acceptance"]["histogram"]) == chat["acceptance"]["drafts"] > 0
    page = get(f"{url}/metrics")
    assert "afaspec:traffic_kept_total" in page
    counters = server_counters(page)
    assert counters is not None
    if counts_requests():
        drafts, accepted = counters.tags["team-a"]
        assert (drafts, accepted) == counted(chat["acceptance"])
        assert counters.tags["team-b"] == (drafts, accepted)  # the same prompt, streamed
        assert sum(drafts for drafts, _ in counters.tags.values()) == counters.spec.drafts
    export = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "afaspec", "traffic", str(folder)]
    shown = subprocess.run(
        [*command, "--export", str(export)], capture_output=True, text=True, cwd=ROOT
    )
    assert shown.returncode == 0, shown.stderr
    assert len(read_prompts(str(export), PromptSettings())) >= 3


def counted(acceptance: Json) -> tuple[int, int]:
    """Drafts and accepted tokens of a row."""
    histogram = acceptance["histogram"]
    return sum(histogram), sum(i * n for i, n in enumerate(histogram))


def test_whoever_opts_out_is_not_kept(url: str, folder: Path) -> None:
    ask(url, "/v1/completions", {"prompt": "keep me out"}, x_afaspec_collect="no")
    ask(url, "/v1/completions", {"prompt": "keep me"})
    found = [row["request"].get("prompt") for row in rows(folder, 1)]
    assert found == ["keep me"]
    assert not [row for row in Traffic(folder).rows() if "out" in str(row["request"])]


@contextmanager
def proxy(behind: str, out: Path, *arguments: str) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "afaspec", "collect", behind, "--out", str(out)]
    command += ["--port", str(port), "--sample-rate", "1", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                assert time.monotonic() < deadline
                assert process.poll() is None, process.stderr and process.stderr.read()
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_a_proxy_passes_everything_on_and_keeps_it(url: str, tmp_path: Path) -> None:
    out = tmp_path / "traffic"
    with proxy(url, out) as before:
        for body in (CHAT, CHAT | {"stream": True}):
            direct = ask(url, "/v1/chat/completions", body)
            passed = ask(before, "/v1/chat/completions", body)
            assert said(passed) == said(direct)
        assert json.loads(get(f"{before}/v1/models"))["data"][0]["id"] == "tiny"
        with pytest.raises(urllib.error.HTTPError, match="404"):
            get(f"{before}/nowhere?x=1")
    first, second = rows(out, 2)
    assert (
        first["response"]["choices"][0]["message"] == (second["response"]["choices"][0]["message"])
    )
    assert first["draft_version"] == 1


def said(body: bytes) -> str:
    """The text of an answer, whole or in pieces."""
    if not body.startswith(b"data:"):
        text: str = json.loads(body)["choices"][0]["message"]["content"]
        return text
    lines = [line[6:] for line in body.decode().splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def test_token_ids_are_kept_in_place_of_texts(url: str, tmp_path: Path) -> None:
    out = tmp_path / "traffic"
    with proxy(url, out, "--keep-ids") as before:
        for stream in (False, True):
            ask(before, "/v1/completions", {"prompt": "import os", "stream": stream})
    first, second = rows(out, 2)
    assert first["response_token_ids"] == second["response_token_ids"]
    assert len(first["response_token_ids"]) == 12
    assert first["prompt_token_ids"] == second["prompt_token_ids"]
    assert "import" not in (out / "000001.jsonl").read_text()


def test_a_proxy_says_when_nobody_is_behind_it(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
        with (
            proxy(nobody, tmp_path) as before,
            pytest.raises(urllib.error.HTTPError, match="502"),
        ):
            get(f"{before}/health")
