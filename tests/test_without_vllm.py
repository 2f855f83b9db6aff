"""`pip install afaspec` alone: training and merging work, serving says what it lacks."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    """Links to all that is installed here, but vLLM and what only vLLM and tests need."""
    folder = tmp_path / "packages"
    folder.mkdir()
    absent = ("vllm", "trl", "xgrammar", "outlines", "openai", "fastapi", "ray")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if not entry.name.startswith(absent) and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


def test_capture_train_and_merge_need_no_vllm(
    tmp_path: Path, packages: Path, tiny_target: Path, tiny_draft: Path
) -> None:
    def afaspec(*arguments: object) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", "-m", "afaspec", *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": f"{packages}:{ROOT}"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )

    texts = "".join(f'{{"text": "def f_{i}(x): return x + {i}"}}\n' for i in range(12))
    (tmp_path / "prompts.jsonl").write_text(texts)
    draft = ("--draft", tiny_draft)
    few = ("--max-new-tokens", 8, "--prompt-tokens", 12)
    steps = ("--steps", 2, "--batch-size", 2, "--rank", 2, "--no-compiled", "--no-tensorboard")
    for command in (
        ("capture", tiny_target, "prompts.jsonl", *draft, "--out", "store", *few),
        ("train", "--store", "store", *draft, "--out", "run", *steps),
        ("merge", "run", "--out", "merged"),
    ):
        ran = afaspec(*command)
        assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "merged" / "model.safetensors").is_file()

    ran = afaspec("serve", tiny_target, "--draft", "merged")
    assert ran.returncode == 2
    assert "vLLM is not installed" in ran.stderr
    assert "pip install" in ran.stderr
