"""Fixtures that every test folder shares: a tiny pair on disk, vLLM for it, and a full disk."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.tiny.models import write_draft, write_target
from tests.tiny.mtp import write_mtp_target
from tests.vllm_client import VllmWorker

if "PYTEST_XDIST_WORKER" in os.environ:  # several of us: a thread each, before torch counts cores
    os.environ.setdefault("OMP_NUM_THREADS", "1")
# What tests compile names their own modules: other programs would find it and warn that it fails.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"torchinductor_{os.getuid()}_tests"),
)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "INFO")  # importing TRL would silence vLLM's logs
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # TRL's trainers would report each test
# Started in the background, a test run ignores SIGINT, and so would all that it starts and signals.
signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = (  # a minute and more, the longest first
    "test_live.py",
    "test_swap.py",
    "test_architectures.py",
    "test_vllm_parity.py",
    "test_worker.py",
    "test_run.py",
    "test_server.py",
    "test_arms.py",
    "test_any_server.py",
    "test_engine.py",
    "test_served.py",
    "test_processes.py",
    "test_demo.py",
    "test_kill.py",
    "test_defaults.py",
    "test_sweep.py",
    "test_sampled.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, so that no process works alone at the end."""
    order = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(LONGEST)))


@pytest.fixture(scope="session")
def tiny_target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random LlamaForCausalLM (4 layers, vocabulary 512) with tokenizer and template."""
    return write_target(tmp_path_factory.mktemp("models") / "tiny-target")


@pytest.fixture(scope="session")
def target_of(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny target that a draft of the family is made for: `tiny_target`, where any will do."""

    @cache
    def choose(family: str) -> Path:
        if family != "mtp":
            return tiny_target
        return write_mtp_target(tmp_path_factory.mktemp("models") / "own-layer", "GLM-4.5")

    return choose


@pytest.fixture(scope="session")
def tiny_draft(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved random EAGLE-3 draft for `tiny_target`, in the EAGLE format, vocabulary 320."""
    return write_draft(tmp_path_factory.mktemp("models") / "tiny-draft")


@pytest.fixture(scope="session")
def vllm_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmWorker]:
    """Real vLLM for tiny models, in one process for all tests that ask for it."""
    worker = VllmWorker(tmp_path_factory.mktemp("vllm") / "worker.log")
    yield worker
    worker.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount a small tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
