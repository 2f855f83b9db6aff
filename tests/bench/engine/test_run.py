"""A whole comparison with real vLLM, as the command line runs it, and its refusals."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bench.prompts.rows import Prompt
from bench.prompts.trained_on import write_roots
from bench.records.speeds import DECODE
from bench.report.files import read_report
from tests.command import run_command
from tests.tiny.models import write_draft

ROOT = Path(__file__).parents[3]
PROMPTS, TOKENS = 5, 16


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of short prompts, two of them the same."""
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    texts = ["def add(a, b):", "class Parser:", "import os", "import os", "x = [1, 2, 3"]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path


def command(target: Path, prompts: Path, out: Path, *options: str) -> list[str]:
    return [
        sys.executable, "-m", "afaspec", "bench", str(target), "--prompts", str(prompts),
        "--max-tokens", str(TOKENS), "--enforce-eager", "--ignore-eos", "--out", str(out), *options,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "100"}


@pytest.mark.parametrize("concurrency", [1, 2])
def test_a_comparison(
    tiny_target: Path, tiny_draft: Path, prompts: Path, tmp_path: Path, concurrency: int
) -> None:
    out = tmp_path / "out"
    draft = Path(shutil.copytree(tiny_draft, tmp_path / "draft"))
    write_roots(draft, [Prompt("", split_key="import  os").root])  # the text of two prompts
    options = ["--draft", f"base={draft}", "--rounds", "2", "--concurrency", str(concurrency)]
    run = subprocess.run(
        command(tiny_target, prompts, out, *options, *(["--ngram"] if concurrency == 1 else [])),
        capture_output=True, text=True, cwd=ROOT, env=environment(), check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert "Base draft" in run.stdout
    report = read_report(out / "report.json")
    names = ["none", "ngram", "base"] if concurrency == 1 else ["none", "base"]
    assert [arm["name"] for arm in report.arms] == names
    base = report.arm("base")
    assert (
        base[DECODE.speedup]["low"] <= base[DECODE.speedup]["value"] <= base[DECODE.speedup]["high"]
    )
    (warning,) = base["warnings"]
    assert "Base draft was trained on 2 of the 5 prompts measured" in warning
    assert warning in run.stderr
    assert warning in (out / "report.html").read_text()
    lossless = base["lossless"]
    assert lossless["prompts"] == PROMPTS
    assert lossless["matching"] + len(lossless["differences"]) == PROMPTS
    assert all(found["near_tie"] for found in lossless["differences"])
    assert base["provenance"]["method"] == "eagle3"
    assert base["provenance"]["draft"]["sha256"] != base["provenance"]["target"]["sha256"]
    assert base["provenance"]["concurrency"] == concurrency
    assert base["provenance"]["command"].startswith("afaspec bench ")
    assert report.example
    assert report.example["answer"]
    measured = json.loads((out / "measurements.json").read_text())
    units = PROMPTS if concurrency == 1 else 2  # blocks of four prompts
    for arm in measured["arms"].values():
        assert [len(row) for row in arm["seconds"]] == [units, units]
        assert [sum(row) for row in arm["tokens"]] == [PROMPTS * (TOKENS - 1)] * 2
    assert len(set(measured["prompts"])) == PROMPTS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 600}, "vocabulary"),
        ({"eagle_aux_hidden_state_layer_ids": [1, 2, 9]}, "layer ids"),
    ],
)
def test_a_draft_that_does_not_fit_starts_nothing(
    tiny_target: Path, prompts: Path, tmp_path: Path, change: dict[str, object], said: str
) -> None:
    draft = write_draft(tmp_path / "draft", **change)
    run = subprocess.run(
        command(tiny_target, prompts, tmp_path / "out", "--draft", f"base={draft}"),
        capture_output=True, text=True, cwd=ROOT, env=environment(), check=False,
    )  # fmt: skip
    assert run.returncode == 2
    assert said in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["bench", "sweep"])
@pytest.mark.parametrize("place", [".", "run", "runs/today"])
def test_results_that_could_not_be_written_are_not_measured(
    name: str, place: str, tiny_target: Path, tiny_draft: Path, prompts: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    options = [tiny_target, "--prompts", prompts, "--draft", f"base={tiny_draft}"]
    code, said = run_command(name, *options, "--out", file / place)
    assert code == 2
    assert f"{file}: is a file" in said
    assert file.read_text() == "mine"


def test_a_killed_run_leaves_no_engine_and_no_report(
    tiny_target: Path, tiny_draft: Path, prompts: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run = subprocess.Popen(
        command(tiny_target, prompts, out, "--draft", f"base={tiny_draft}", "--rounds", "1000"),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=environment(),
    )  # fmt: skip
    engines: list[psutil.Process] = []
    deadline = time.monotonic() + 240
    while len(engines) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        engines = [
            child
            for child in psutil.Process(run.pid).children()
            if "serving.engine.worker" in child.cmdline()
        ]
    assert len(engines) == 2
    family = [*engines, *(grandchild for e in engines for grandchild in e.children(recursive=True))]
    run.send_signal(signal.SIGKILL)
    run.wait()
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not [p for p in alive if p.status() != psutil.STATUS_ZOMBIE]
    assert not (out / "report.json").exists()
    assert not (out / "report.html").exists()
