"""Is there room on this machine for a second server like the one that runs?"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

import psutil

from serving.runtime import FEW_CORES, has_gpu, usable_cores

MARGIN = 1.2  # a server that starts needs more than one that runs


def room_for_two(session: int) -> bool:
    """Does what is free hold what the processes of this session hold, with a margin?

    On GPUs that is their memory there, of which vLLM by default takes nearly all. On a machine of
    few cores without a GPU there never is: both servers' threads are bound to the same cores, and
    beside a busy server another one did not start in eight minutes (two cores; alone in 20 s).
    """
    if not has_gpu() and usable_cores() <= FEW_CORES:
        return False
    pids = [process.pid for process in psutil.process_iter() if _session(process.pid) == session]
    held, free = (
        _on_gpus(pids) if has_gpu() else (_in_memory(pids), psutil.virtual_memory().available)
    )
    return free > MARGIN * held


def _session(pid: int) -> int:
    try:
        return os.getsid(pid)
    except OSError:
        return -1


def _in_memory(pids: list[int]) -> int:
    """Bytes that these processes alone hold."""
    held = 0
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            held += psutil.Process(pid).memory_full_info().uss
    return held


def _on_gpus(pids: list[int]) -> tuple[int, int]:
    """MiB that these processes hold, and MiB that are free. No room where nobody says."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return 1, 0
    held = [row for row in _ask(program, "compute-apps=pid,used_memory") if int(row[0]) in pids]
    free = _ask(program, "gpu=memory.free")
    return sum(int(row[1]) for row in held), sum(int(row[0]) for row in free)


def _ask(program: str, query: str) -> list[list[str]]:
    answer = subprocess.run(
        [program, f"--query-{query}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    return [[cell.strip() for cell in line.split(",")] for line in answer.stdout.splitlines()]
