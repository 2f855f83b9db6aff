"""Runs a command in a process group of its own, and ends that whole group with its parent.

Started as `python guardian.py GRACE COMMAND...` with a pipe as stdin. The parent holds the only
writing end, so the pipe ends when the parent closes it or dies, however it dies. Then, or when the
command ends by itself, the group gets SIGTERM and, after GRACE seconds, SIGKILL. SIGTERM to the
guardian means SIGKILL for the group at once. The exit status is the command's.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable

POLL_SECONDS = 0.2


def main() -> int:
    """Guard the command until it or the parent ends."""
    grace, command = float(sys.argv[1]), sys.argv[2:]
    hurry = False

    def at_once(*_: object) -> None:
        nonlocal hurry
        hurry = True

    signal.signal(signal.SIGTERM, at_once)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        process_group=0,
        close_fds=False,  # what the parent passed on, a listening socket, is for the command
    )
    while child.poll() is None and not hurry and not _pipe_ended():
        pass
    end_group(child, grace, lambda: hurry)
    code = child.wait()
    return code if code >= 0 else 128 - code


def end_group(child: subprocess.Popen[bytes], grace: float, hurry: Callable[[], bool]) -> None:
    """SIGTERM to the child's group, and SIGKILL to what is left of it after `grace` seconds."""
    deadline = time.monotonic() + grace
    alive = _signal_group(child.pid, signal.SIGTERM)
    while alive and not hurry() and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS / 4)
        child.poll()  # reap it, or its group would never be empty
        alive = _signal_group(child.pid, 0)
    _signal_group(child.pid, signal.SIGKILL)


def _signal_group(group: int, number: int) -> bool:
    """Send a signal; False when nobody is left in the group."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):  # macOS answers so for a group of zombies
        return False
    return True


def _pipe_ended() -> bool:
    readable, _, _ = select.select([0], [], [], POLL_SECONDS)
    return bool(readable) and not os.read(0, 4096)


if __name__ == "__main__":
    sys.exit(main())
