"""One step, however it is divided: micro-batches, and real processes of torchrun on gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from afaspec.capture.config import CaptureConfig
from afaspec.cli import console as consoles
from afaspec.cli import processes
from afaspec.store.read import FeatureStore
from afaspec.train.config import TrainConfig
from tests.command import run_command
from tests.opened import capture, train
from tests.tiny.gradients import batches_of, run_settings, step_gradient

WORDS = "for every value in the list of all pairs"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path) -> Path:
    """Responses of several lengths, so that parts of a step differ in what they count."""
    return uneven(tmp_path_factory.mktemp("uneven") / "store", tiny_target, tiny_draft, "def")


def uneven(folder: Path, tiny_target: Path, tiny_draft: Path, word: str) -> Path:
    rows = folder.with_suffix(".jsonl")
    pairs = [(f"{word} f{i}(x)", f"{WORDS} {i}" * (i % 5 + 1)) for i in range(24)]
    lines = [json.dumps({"prompt": prompt, "response": text}) + "\n" for prompt, text in pairs]
    rows.write_text("".join(lines))
    settings = CaptureConfig(
        target=str(tiny_target), prompts=str(rows), out=folder, draft=tiny_draft,
        use_responses=True, batch_size=8, device="cpu", dtype="float32",
    )  # fmt: skip
    lengths = [int(s.loss_mask.sum()) for s in capture(settings)]
    assert max(lengths) > 4 * min(lengths)
    return folder


def torchrun(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Two processes of `python -m ARGUMENTS`."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", "-m", *map(str, arguments)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)


def assert_same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """To float32 rounding, against each tensor's largest entry."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert tensor.abs().max() > 0, name
        assert (tensor - two[name]).abs().max() <= 1e-5 * tensor.abs().max(), name


def test_four_micro_batches_of_two_have_the_gradient_of_one_of_eight(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    whole = step_gradient(run_settings(store, tiny_draft, tmp_path, 8, 1))
    parts = step_gradient(run_settings(store, tiny_draft, tmp_path, 2, 4))
    assert_same(whole, parts)


@pytest.mark.parametrize("tokens", [1, 60, 200])
def test_parts_of_some_tokens_have_the_gradient_of_the_whole(
    tokens: int, store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    settings = run_settings(store, tiny_draft, tmp_path, 8, 1)
    whole = step_gradient(settings)
    changes = {"batch_tokens": tokens, "gradient_checkpointing": True}
    assert_same(whole, step_gradient(settings.model_copy(update=changes)))


@pytest.mark.parametrize(("tokens", "parts"), [(None, 1), (10_000, 1), (80, None), (1, 8)])
def test_parts_are_whole_sequences_of_no_more_tokens_than_asked(
    tokens: int | None, parts: int | None, store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    settings = run_settings(store, tiny_draft, tmp_path, 8, 1)
    settings = settings.model_copy(update={"batch_tokens": tokens})
    batches, opened = batches_of(settings), FeatureStore.open(store)
    (micro,) = batches.sequences(0)
    found = list(batches.in_parts(micro))
    assert [one for part in found for one in part] == micro
    assert parts in (None, len(found))
    if tokens is not None:
        sizes = [sum(len(opened[index]) for _, index in part) for part in found]
        assert all(s <= tokens or len(p) == 1 for s, p in zip(sizes, found, strict=True))
    assert len(batches.losses(0)) == len(found)


def test_two_processes_have_the_gradient_of_one(
    store: Path, tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    """Batches of five, of which one process gets three; and two of them in a step.

    A third of the sequences comes from another store.
    """
    mix = f"{uneven(tmp_path / 'other', tiny_target, tiny_draft, 'class')}=0.3"
    whole = step_gradient(run_settings(store, tiny_draft, tmp_path, 10, 1, mix))
    out = tmp_path / "gradient.safetensors"
    done = torchrun("tests.tiny.gradients", store, tiny_draft, out, 5, 2, mix)
    assert done.returncode == 0, done.stderr
    assert_same(whole, load_file(out))


RUN: dict[str, Any] = {
    "arm": "afa-lora", "rank": 4, "steps": 6, "eval_every": 2, "checkpoint_every": 2,
    "batch_size": 5, "eval_fraction": 0.2, "learning_rate": 1e-3, "precision": "fp32",
    "init": "default",
}  # fmt: skip


def flags(store: Path, draft: Path, out: Path, **changes: Any) -> list[object]:
    given = {"store": store, "draft": draft, "out": out, **RUN, **changes}
    pairs = [(f"--{name.replace('_', '-')}", value) for name, value in given.items()]
    return ["train", *(part for pair in pairs for part in pair), "--no-compiled"]


def rows_of(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_two_processes_are_one_run(store: Path, tiny_draft: Path, tmp_path: Path) -> None:
    settings = TrainConfig(
        store=store, draft=tiny_draft, out=tmp_path / "one", compiled=False, **RUN
    )
    train(settings)
    done = torchrun("afaspec", *flags(store, tiny_draft, tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("Best: step") == 1
    one, two = rows_of(tmp_path / "one"), rows_of(tmp_path / "two")
    assert [row["step"] for row in two] == [0, 1, 2, 3, 4, 5, 6]
    for row, other in zip(one, two, strict=True):
        for name, value in row.items():
            assert other[name] == pytest.approx(value, rel=1e-5), (row["step"], name)
    assert len(list((tmp_path / "two" / "tensorboard").iterdir())) == 1
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["processes"] == 2
    trained = [load_file(tmp_path / n / "checkpoint/trainable.safetensors") for n in ("one", "two")]
    for name, tensor in trained[0].items():
        assert (tensor - trained[1][name]).abs().max() <= 1e-5, name


def test_two_processes_go_on_with_a_run(store: Path, tiny_draft: Path, tmp_path: Path) -> None:
    """One that one process began, and that stopped between two checkpoints."""

    class StopNowError(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 3:
            raise StopNowError

    out = tmp_path / "run"
    settings = TrainConfig(store=store, draft=tiny_draft, out=out, compiled=False, **RUN)
    with pytest.raises(StopNowError):
        train(settings, stop)
    done = torchrun("afaspec", *flags(store, tiny_draft, out))
    assert done.returncode == 0, done.stderr
    train(settings.model_copy(update={"out": tmp_path / "whole"}))
    one, two = rows_of(tmp_path / "whole"), rows_of(out)
    assert [row["loss"] for row in two[1:]] == pytest.approx(
        [row["loss"] for row in one[1:]], rel=1e-5
    )


def test_a_mistake_of_all_processes_is_told_once(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    done = torchrun("afaspec", *flags(store, tiny_draft, tmp_path / "run", batch_size=1))
    assert done.returncode != 0
    assert "batch_size is 1, but 2 processes divide a batch" in done.stderr
    assert done.stderr.count("\nError: ") == 1
    assert not (tmp_path / "run").exists()


def test_a_command_that_does_not_divide_its_work_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, error = run_command("capture", "TARGET", "PROMPTS", "--out", tmp_path / "store")
    assert code == 2
    assert "afaspec capture runs in one process, but torchrun started 2" in error
    assert not (tmp_path / "store").exists()


def test_an_error_of_one_process_alone_is_told_in_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The second process is not ended by torchrun, as the first has no error."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(processes, "PATIENCE", 0.01)
    monkeypatch.setattr(consoles.console, "quiet", True)
    code, error = run_command("train", "--out", "OUT")
    assert code == 2
    assert "the setting store is missing" in error


def test_store_tokens_are_those_of_its_sequences(store: Path) -> None:
    opened = FeatureStore.open(store)
    for index in (0, 9, 23):
        ids, mask = opened.tokens_at(index)
        assert torch.equal(ids, opened[index].input_ids)
        assert torch.equal(mask, opened[index].loss_mask)
