"""The guardian ends its command's whole group, however stubborn and however its parent ends."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import psutil
import pytest

from serving.server.process import GUARDIAN

STUBBORN = "trap '' TERM; (trap '' TERM; sleep 300) & echo ready; sleep 300; sleep 300"
SECONDS = 60  # until a test gives up: machines may be busy
POLITE = "trap 'exit 7' TERM; sleep 300 & echo ready; wait"


def guard(script: str, grace: str = "10") -> subprocess.Popen[str]:
    command = [sys.executable, "-P", str(GUARDIAN), grace, "sh", "-c", script]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return subprocess.Popen(command, **pipes, text=True, start_new_session=True)


def wait_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def left_over(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            same = os.getsid(process.pid) == session
        except ProcessLookupError:
            continue
        if same and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process)
    return found


def wait_until_alone(session: int) -> None:
    """Killed processes take a moment to go."""
    deadline = time.monotonic() + SECONDS
    while left := left_over(session):
        assert time.monotonic() < deadline, f"still alive: {left}"
        time.sleep(0.05)


def test_the_commands_status_is_the_guardians() -> None:
    assert guard("exit 3").wait(timeout=SECONDS) == 3
    assert guard("kill -KILL $$").wait(timeout=SECONDS) == 128 + 9


@pytest.mark.parametrize(("script", "status"), [(POLITE, 7), (STUBBORN, 128 + 9)])
def test_the_group_ends_when_the_pipe_closes(script: str, status: int) -> None:
    process = guard(script, grace="0.5")
    wait_ready(process)
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(timeout=SECONDS) == status
    wait_until_alone(process.pid)


def test_sigterm_kills_at_once() -> None:
    process = guard(STUBBORN, grace="100")
    wait_ready(process)
    process.terminate()
    assert process.wait(timeout=SECONDS) == 128 + 9
    wait_until_alone(process.pid)


def test_children_that_the_command_leaves_behind_end_too() -> None:
    process = guard("sleep 300 & echo ready; exit 4")
    wait_ready(process)
    assert process.wait(timeout=SECONDS) == 4
    wait_until_alone(process.pid)
