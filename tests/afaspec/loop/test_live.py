"""A real server, real clients, a real loop that is killed: a worse draft does not stay."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file, save_file

from afaspec.loop.history import Entry, History
from afaspec.loop.spans import read_spans
from afaspec.pairs.names import open_draft
from serving.server.ask import ask_for_versions
from tests.serving.server.servers import FAST, ROOT, serving

PROMPTS = ["import os\n\ndef ", "class Reader:\n    def __init__(", "for line in open(path):\n    "]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    arguments = ["embedded", "--draft", "embedded-draft", "--port", "0", "--swappable"]
    with serving(tmp_path_factory.mktemp("server"), *arguments, "--", *FAST) as command:
        command.wait_ready()
        found = re.search(r"http://127\.0\.0\.1:\d+", command.out)
        assert found
        yield found[0]
        command.process.send_signal(signal.SIGTERM)
        command.process.wait(timeout=60)


@contextmanager
def asking(url: str) -> Iterator[list[str]]:
    """Clients that ask all the time; what they got, by prompt, must be the same whoever drafts."""
    over = threading.Event()
    wrong: list[str] = []
    known: dict[str, str] = {}

    def ask(number: int) -> None:
        while not over.is_set():
            prompt = PROMPTS[number]
            body = {"prompt": prompt, "max_tokens": 48, "temperature": 0, "ignore_eos": True}
            request = urllib.request.Request(
                f"{url}/v1/completions",
                json.dumps(body).encode(),
                {"content-type": "application/json"},
            )
            try:
                with urllib.request.urlopen(request, timeout=120) as answer:
                    text = json.load(answer)["choices"][0]["text"]
            except OSError as error:
                wrong.append(str(error))
                return
            if known.setdefault(prompt, text) != text:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    try:
        yield wrong
    finally:
        over.set()
        for thread in threads:
            thread.join()


def start(config: Path) -> subprocess.Popen[bytes]:
    with config.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "afaspec", "loop", "run", str(config)],
            stdout=log,
            stderr=log,
            cwd=ROOT,
        )


def eventually(
    found: Callable[[], Any], loop: subprocess.Popen[bytes], log: Path, wrong: list[str]
) -> Any:
    end = time.monotonic() + 300
    while not (value := found()):
        assert not wrong
        assert loop.poll() is None, log.read_text()
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)
    return value


def test_a_worse_draft_is_taken_back_though_the_loop_is_killed(url: str, tmp_path: Path) -> None:
    good, worse = open_draft("embedded-draft").folder, tmp_path / "worse"
    shutil.copytree(good, worse)
    tensors = load_file(worse / "model.safetensors")
    tensors["fc.weight"] = -tensors["fc.weight"]
    save_file(tensors, worse / "model.safetensors", metadata={"format": "pt"})
    out, config = tmp_path / "loop", tmp_path / "loop.yaml"
    out.mkdir()
    settings = {
        "url": url, "target": "embedded", "draft": "embedded-draft", "general": "suite:builtin",
        "traffic": str(tmp_path / "traffic"), "out": str(out), "every": 0.3, "probation": 2000,
    }  # fmt: skip
    config.write_text(yaml.safe_dump(settings))

    def history() -> History:
        return History(out, read_only=True)

    def serves() -> str:
        return str(ask_for_versions(url)[-1]["folder"])

    with asking(url) as wrong:
        began = time.time()
        loop = start(config)
        try:
            log = config.with_suffix(".log")
            eventually(lambda: sum(s.drafts for s in read_spans(out)) > 1200, loop, log, wrong)
            other = subprocess.run(
                [sys.executable, "-m", "afaspec", "loop", "run", str(config)],
                capture_output=True, text=True, cwd=ROOT,
            )  # fmt: skip
            assert other.returncode == 2
            assert "another afaspec loop is writing here" in other.stderr
            loop.send_signal(signal.SIGKILL)
            loop.wait()
            # As if the gate had let it pass: what follows is what live traffic says of it.
            data = {"since": began, "serves": str(good), "new": str(worse)}
            History(out).add(Entry(time.time(), 1, "swap", "for a test", data))
            loop = start(config)
            eventually(lambda: history().last.state == "probation", loop, log, wrong)
            assert serves() == str(worse)
            loop.send_signal(signal.SIGKILL)
            loop.wait()
            loop = start(config)
            eventually(lambda: history().last.outcome == "rolled back", loop, log, wrong)
            assert serves() == str(good)
        finally:
            loop.kill()
            loop.wait()
    assert not wrong
    states = [entry.state for entry in history().entries]
    assert states == ["swap", "probation", "restore", "watch"]
    assert "beyond doubt worse" in history().entries[2].words
    status = subprocess.run(
        [sys.executable, "-m", "afaspec", "loop", "status", str(config)],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert "rolled back" in status.stderr
