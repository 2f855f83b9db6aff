"""A disk that fills up under a command that writes: one clear error, and no half file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.command import run_command
from tests.tiny.store import write_store

LEFT = 40_000  # bytes: room for a configuration and some metrics, not for weights


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path) -> Path:
    return write_store(tmp_path_factory.mktemp("full") / "store", tiny_target, tiny_draft)


def fill(disk: Path, left: int = LEFT) -> Path:
    filler = disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(disk).free - left))
    return filler


def one_error(code: int, error: str) -> None:
    assert code == 2, error
    assert "the disk is full" in error
    assert error.count("Error:") == 1
    assert "Traceback" not in error


def training(store: Path, draft: Path, out: Path, *flags: object) -> list[object]:
    short = ["--steps", 4, "--eval-every", 2, "--checkpoint-every", 2, "--rank", 2]
    options = ["--store", store, "--draft", draft, "--out", out, *short, "--no-compiled"]
    return ["train", *options, *flags]


@pytest.mark.parametrize("arm", ["afa-lora", "full"])
@pytest.mark.parametrize("left", [LEFT, 4096, 0])  # 4096: no room for metrics
def test_training_stops_and_goes_on_with_space_again(
    arm: str, left: int, store: Path, tiny_draft: Path, small_disk: Path
) -> None:
    out = small_disk / "run"
    command = training(store, tiny_draft, out, "--arm", arm, "--no-tensorboard")
    filler = fill(small_disk, left)
    one_error(*run_command(*command))
    assert not list(small_disk.rglob("*.safetensors"))
    filler.unlink()
    if arm == "full":  # whose optimizer state is more than the disk holds
        return
    code, error = run_command(*command)
    assert code == 0, error
    assert load_file(out / "adapter" / "adapter_model.safetensors")


def test_training_with_tensorboard_stops_too(
    store: Path, tiny_draft: Path, small_disk: Path
) -> None:
    fill(small_disk)
    one_error(*run_command(*training(store, tiny_draft, small_disk / "run")))


def test_a_draft_is_written_whole_or_not_at_all(
    store: Path, tiny_draft: Path, tiny_target: Path, tmp_path: Path, small_disk: Path
) -> None:
    code, error = run_command(*training(store, tiny_draft, tmp_path / "run", "--no-tensorboard"))
    assert code == 0, error
    fill(small_disk)
    out = small_disk / "out"
    for command in (
        ["merge", tmp_path / "run", "--out", out],
        ["init", "eagle", "--target", tiny_target, "--out", out],
        ["convert", tiny_draft, "--to", "speculators", "--target", tiny_target, "--out", out],
    ):
        one_error(*run_command(*command))
        assert [path.name for path in small_disk.iterdir()] == ["filler"], command


def test_a_file_where_a_folder_should_be(
    store: Path, tiny_draft: Path, tiny_target: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file" / "out", tmp_path / "file" / "in" / "out"):
        to = ["--to", "speculators", "--target", tiny_target]
        code, error = run_command("convert", tiny_draft, *to, "--out", out)
        assert code == 2, error
        assert "this folder cannot be made" in error
        code, error = run_command(*training(store, tiny_draft, out, "--no-tensorboard"))
        assert code == 2, error
        assert "this folder cannot be made" in error
    assert (tmp_path / "file").read_text() == "mine"
