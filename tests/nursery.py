"""Real `afaspec` processes that start in milliseconds, to be killed at will."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


class Nursery:
    """Starts real `afaspec` processes quickly."""

    def __init__(self) -> None:
        script = Path(__file__).with_name("nursery_process.py")
        root = str(Path(__file__).parents[1])
        self.process = subprocess.Popen(
            [sys.executable, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
        )
        assert self._line() == "ready"

    def start(self, *arguments: object) -> int:
        """The process id of a new `afaspec ARGUMENTS`."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(list(map(str, arguments))) + "\n")
        self.process.stdin.flush()
        return int(self._line())

    def wait(self) -> int:
        """Wait for the process that was started last: its exit code, or minus its signal."""
        return int(self._line())

    def close(self) -> None:
        """End the nursery; what it started has been waited for."""
        self.process.kill()
        self.process.wait()

    def _line(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
