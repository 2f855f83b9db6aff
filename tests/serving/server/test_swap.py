"""The draft of a real server changes while real clients ask: nothing is lost, nothing is wrong."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from drafts.checkpoint.family import InitOptions
from drafts.errors import UserError
from drafts.registry import save_draft
from serving.metrics import counters_from_prometheus
from serving.server.admin import note_path
from serving.server.ask import ask_for_change, ask_for_versions
from tests.opened import init_draft
from tests.serving.server.servers import FAST, ROOT, Command, get, serving
from tests.tiny.models import write_draft

PROMPTS = [[5, 6, 7, 8], [300, 4, 4], [17, 40, 200, 9, 11]]
TOKENS = 12
SWAPS, ANSWERS = 20, 500


class Drafts:
    """Two of one build, one of another vocabulary, one of another family."""

    def __init__(self, folder: Path, target: Path):
        self.first = write_draft(folder / "first")
        self.second = write_draft(folder / "second")
        change_values(self.second)
        self.other_words = write_draft(folder / "other-words", seed=2)
        self.medusa = folder / "medusa"
        self.medusa.mkdir()
        medusa = init_draft("medusa", target, InitOptions(max_k=2))
        save_draft(medusa, "medusa", self.medusa, dtype=torch.float32)


def change_values(folder: Path) -> None:
    """Other weights, the same vocabulary."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["fc.weight"] = -tensors["fc.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def drafts(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Drafts:
    return Drafts(tmp_path_factory.mktemp("drafts"), tiny_target)


@pytest.fixture(scope="module")
def server(
    tiny_target: Path, drafts: Drafts, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Command]:
    arguments = [str(tiny_target), "--draft", str(drafts.first), "--k", "2", "--port", "0"]
    passed_on = ["--served-model-name", "tiny", "--dtype", "float32", *FAST]
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, *arguments, "--swappable", "--", *passed_on) as command:
        command.wait_ready()
        yield command


@pytest.fixture(scope="module")
def url(server: Command) -> str:
    found = re.search(r"http://127\.0\.0\.1:\d+", server.out)
    assert found is not None
    return found[0]


def complete(url: str, prompt: list[int]) -> tuple[str, int]:
    """The greedy answer, and the version of the draft that was named with it."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body | {"ignore_eos": True}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        assert answer.status == 200
        text: str = json.load(answer)["choices"][0]["text"]
        return text, int(answer.headers["x-draft-version"])


def accepted(url: str) -> list[int]:
    """How many drafted tokens are kept for each prompt, and that the answers are as ever."""
    found = []
    for prompt in PROMPTS:
        before = counters_from_prometheus(get(f"{url}/metrics"))
        complete(url, prompt)
        spent = counters_from_prometheus(get(f"{url}/metrics")) - before
        found += [spent.drafts, spent.accepted_tokens]
    return found


def swap_command(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "afaspec", "swap", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)


class Traffic:
    """Clients that ask, with a pause between; `answers` are by prompt."""

    def __init__(self, url: str, clients: int = 3, pause: float = 0.0):
        self.pause = pause
        self.answers: dict[int, set[str]] = {i: set() for i in range(len(PROMPTS))}
        self.versions: set[int] = set()
        self.failures: list[str] = []
        self.count = 0
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(url, i)) for i in range(clients)]

    def _ask(self, url: str, client: int) -> None:
        place = client
        while not self._stop.wait(self.pause):
            place = (place + 1) % len(PROMPTS)
            try:
                text, version = complete(url, PROMPTS[place])
            except (OSError, AssertionError) as error:
                self.failures.append(repr(error))
                continue
            self.answers[place].add(text)
            self.versions.add(version)
            self.count += 1

    def wait_for(self, count: int, version: int | None = None) -> None:
        """Until so many were answered in all, and one of them by this version."""
        deadline = time.monotonic() + 300
        while not self.failures and (
            self.count < count or (version is not None and version not in self.versions)
        ):
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def test_a_draft_changes_in_place_and_back(url: str, drafts: Drafts) -> None:
    before = accepted(url)
    text, version = complete(url, PROMPTS[0])
    done = swap_command(url, str(drafts.second))
    assert done.returncode == 0, done.stderr
    assert "in place" in done.stderr
    other = accepted(url)
    assert other != before, "the second draft is accepted as the first"
    assert complete(url, PROMPTS[0]) == (text, version + 1)
    page = get(f"{url}/metrics")
    assert re.search(rf'afaspec:draft_version{{draft="\w{{12}}"}} {version + 1}\.0', page)
    assert "afaspec:draft_swaps_total 1.0" in page
    done = swap_command(url, "--back")
    assert done.returncode == 0, done.stderr
    assert accepted(url) == before
    shown = swap_command(url)
    assert shown.stderr.count("in place") == 2


def test_no_request_is_lost_or_changed_while_drafts_change_in_place(
    url: str, drafts: Drafts
) -> None:
    expected = [complete(url, prompt)[0] for prompt in PROMPTS]
    with Traffic(url, clients=4) as traffic:
        for i in range(SWAPS):
            draft = (drafts.second, drafts.first)[i % 2]
            done = ask_for_change(url, draft, "in-place", lambda _: None)
            traffic.wait_for(ANSWERS * (i + 1) // SWAPS, version=done["number"])
    assert traffic.failures == []
    assert {i: {text} for i, text in enumerate(expected)} == traffic.answers


def test_what_does_not_fit_is_refused_and_the_running_draft_goes_on(
    url: str, drafts: Drafts, tmp_path: Path
) -> None:
    before = ask_for_versions(url)
    unfit = write_draft(tmp_path / "unfit", vocab_size=600)
    with pytest.raises(UserError, match="vocabulary"):
        ask_for_change(url, unfit)
    with pytest.raises(UserError, match="not eagle3"):
        ask_for_change(url, drafts.medusa, "in-place")
    broken = write_draft(tmp_path / "broken")
    whole = (broken / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        ask_for_change(url, broken)
    assert ask_for_versions(url) == before
    complete(url, PROMPTS[0])


def test_nothing_is_changed_without_the_token(url: str, drafts: Drafts) -> None:
    path = note_path(url)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    note: dict[str, Any] = json.loads(path.read_text())
    assert note["url"].startswith("http://127.0.0.1:")
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": note["token"][:-1]}):
        for data in (None, json.dumps({"folder": str(drafts.second)}).encode()):
            request = urllib.request.Request(f"{note['url']}/draft", data, headers)
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(request, timeout=30)
    for route in ("/draft", "/swap", "/state", "/collective_rpc", "/start_draft_weight_update"):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(url + route, timeout=30)


def test_a_watch_sees_the_traffic_and_the_versions(url: str, tmp_path: Path) -> None:
    out = tmp_path / "watch.jsonl"
    command = [sys.executable, "-m", "afaspec", "watch", url, "--every", "0.3", "--out", str(out)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        with Traffic(url, clients=1) as traffic:
            deadline = time.monotonic() + 120
            while not out.exists() or not any(look["drafts"] for look in _looks(out)):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.2)
            done = ask_for_change(url, None, "auto", lambda _: None)
            while _looks(out)[-1]["version"] != done["number"]:
                assert time.monotonic() < deadline + 120
                time.sleep(0.2)
        assert traffic.failures == []
    finally:
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "acceptance length" in said
    looked = _looks(out)
    assert {look["version"] for look in looked} >= {done["number"] - 1, done["number"]}
    lengths = [look["all"]["recent"] for look in looked]
    assert all(1 <= length <= 3 for length in lengths if length is not None)


def _looks(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_another_server_takes_over_and_no_request_is_lost(url: str, drafts: Drafts) -> None:
    """Other words, beside the running server; then another family, after it."""
    expected = [complete(url, prompt)[0] for prompt in PROMPTS]
    said: list[str] = []
    with Traffic(url, clients=1, pause=2.0) as gentle:  # two servers share the cores here
        rolled = ask_for_change(url, drafts.other_words, "rolling", said.append)
        gentle.wait_for(gentle.count + 2)
    with Traffic(url) as traffic:
        traffic.wait_for(10)
        drained = ask_for_change(url, drafts.medusa, "drained", said.append)
        traffic.wait_for(traffic.count + 10)
    assert rolled["how"] == "rolling restart"
    assert drained["how"] == "drained restart"
    for clients, done in ((gentle, rolled), (traffic, drained)):
        assert clients.failures == []
        assert clients.versions == {done["number"] - 1, done["number"]}
        assert clients.answers == {i: {text} for i, text in enumerate(expected)}


def test_where_the_next_server_does_not_start_the_old_draft_comes_back(
    url: str, drafts: Drafts, tmp_path: Path
) -> None:
    """Its weights are gone once all checks have passed; whoever asks meanwhile waits."""
    expected = [complete(url, prompt)[0] for prompt in PROMPTS]
    before = ask_for_versions(url)
    gone = write_draft(tmp_path / "gone")
    said: list[str] = []

    def report(line: str) -> None:
        said.append(line)
        if "ends first" in line:
            (gone / "model.safetensors").unlink()

    with Traffic(url) as traffic:
        traffic.wait_for(5)
        with pytest.raises(UserError, match="log"):
            ask_for_change(url, gone, "drained", report)
        traffic.wait_for(traffic.count + 5)
    assert "it does not start; the old draft comes back" in said
    assert ask_for_versions(url) == before
    assert traffic.failures == []
    assert traffic.versions == {before[-1]["number"]}
    assert traffic.answers == {i: {text} for i, text in enumerate(expected)}


def test_two_tensor_parallel_workers_take_a_draft(
    tiny_target: Path, drafts: Drafts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("two workers want a core each")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[1]}")
    arguments = [str(tiny_target), "--draft", str(drafts.first), "--k", "2", "--port", "0"]
    passed_on = ["--served-model-name", "tiny", "--dtype", "float32", *FAST]
    passed_on += ["--tensor-parallel-size", "2"]
    with serving(tmp_path, *arguments, "--swappable", "--", *passed_on) as command:
        command.wait_ready()
        found = re.search(r"http://127\.0\.0\.1:\d+", command.out)
        assert found
        url = found[0]
        before, (text, version) = accepted(url), complete(url, PROMPTS[0])
        done = ask_for_change(url, drafts.second, "in-place", lambda _: None)
        assert done["how"] == "in place"
        assert accepted(url) != before, "the second draft is accepted as the first"
        assert complete(url, PROMPTS[0]) == (text, version + 1)
        ask_for_change(url, None, "in-place", lambda _: None)
        assert accepted(url) == before
