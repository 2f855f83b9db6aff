"""Real `afaspec serve` commands for the tests, and a look at the processes they start."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

FAST = ("--enforce-eager", "--max-model-len", "256", "--max-num-seqs", "4")
ROOT = Path(__file__).resolve().parents[3]


class Command:
    """A running `afaspec serve`; `sessions` collects the sessions that its children made."""

    def __init__(self, folder: Path, *arguments: str):
        folder.mkdir(parents=True, exist_ok=True)
        self.log, self._out, self._err = folder / "server.log", folder / "out", folder / "err"
        command = [sys.executable, "-m", "afaspec", "serve", *arguments]
        if "--" in command:
            place = command.index("--")
            command[place:place] = ["--log", str(self.log)]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(command, stdout=out, stderr=err, cwd=ROOT)
        self.sessions: set[int] = set()

    @property
    def out(self) -> str:
        return self._out.read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return self._err.read_text(encoding="utf-8")

    def children(self) -> list[psutil.Process]:
        """Live processes of the sessions that this command started (zombies do not count)."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children():
                self.sessions.add(child.pid)
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, ProcessLookupError):
                alive = process.status() != psutil.STATUS_ZOMBIE
                if os.getsid(process.pid) in self.sessions and alive:
                    found.append(process)
        return found

    def wait_for(self, condition: Callable[[], bool], seconds: float, what: str) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            log = self.log.read_text(errors="replace")[-2000:] if self.log.exists() else ""
            state = f"{self.err}\n{log}"
            assert self.process.poll() is None, f"ended while waiting for {what}: {state}"
            assert time.monotonic() < deadline, f"no {what} after {seconds} s: {state}"
            time.sleep(0.1)

    def wait_ready(self) -> None:
        self.wait_for(lambda: "curl" in self.out, 480, "curl line")

    def wait_for_engine(self) -> None:
        """Until vLLM's engine core is up: guardian, server, resource tracker and engine."""
        self.wait_for(lambda: len(self.children()) >= 4, 480, "engine")

    def assert_all_ended(self, seconds: float = 60) -> None:
        deadline = time.monotonic() + seconds
        while left := self.children():
            assert time.monotonic() < deadline, f"still alive: {left}"
            time.sleep(0.1)


@contextmanager
def serving(folder: Path, *arguments: str) -> Iterator[Command]:
    """A command that is killed, with everything it started, when the test fails half-way."""
    command = Command(folder, *arguments)
    try:
        yield command
    finally:
        if command.process.poll() is None:
            command.process.kill()
            command.process.wait()
            command.assert_all_ended()


def post(url: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        url, json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        result: dict[str, Any] = json.load(answer)
        return result


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=60) as answer:
        text: str = answer.read().decode()
        return text
