"""A run stops where it is no longer finite, says where, and keeps nothing of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from afaspec.store.read import FeatureStore
from afaspec.train.config import TrainConfig
from afaspec.train.loader import split_sequences
from afaspec.train.step import training_step
from drafts.errors import NotFiniteError, UserError
from drafts.hashes import hash_file
from tests.command import run_command
from tests.opened import train
from tests.tiny.store import write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path) -> Path:
    folder = tmp_path_factory.mktemp("finite") / "store"
    return write_store(folder, tiny_target, tiny_draft, prompts=12)


def config(store: Path, draft: Path, out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "steps": 6, "eval_every": 1, "checkpoint_every": 1, "batch_size": 4, "rank": 4,
        "precision": "fp32", "compiled": False, "tensorboard": False,
    }  # fmt: skip
    return TrainConfig(store=store, draft=draft, out=out, **(settings | changes))


@pytest.mark.parametrize("arm", ["lora", "full"])
def test_a_rate_far_too_high(arm: str, store: Path, tiny_draft: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    code, error = run_command(
        "train", "--store", store, "--draft", tiny_draft, "--out", out, "--arm", arm,
        "--learning-rate", "1e30", "--steps", 8, "--rank", 4, "--batch-size", 4, "--eval-every", 1,
        "--warmup", 0, "--precision", "fp32", "--no-compiled", "--no-tensorboard",
    )  # fmt: skip
    text = " ".join(error.split())
    assert code == 2, text
    assert "at step 1 of 8, where the learning rate is 1e+30" in text
    assert "To mend it: train anew in another --out with a lower --learning-rate" in text
    assert not (out / "adapter").exists()
    assert not (out / "weights").exists()
    assert not (out / "manifest.json").exists()


def test_the_last_checkpoint_is_the_one_before(
    store: Path, tiny_draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss breaks at step 4: what was good until then stays, and it breaks there again."""
    from afaspec.train import losses

    calls = 0

    def breaks(q: Tensor, p: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return losses.kl(q, p) * (math.nan if calls > 3 * 3 else 1.0)

    settings = config(store, tiny_draft, tmp_path / "run", init="default")
    monkeypatch.setitem(losses.LOSSES, "kl", breaks)
    with pytest.raises(UserError, match="the loss is nan at step 4 of 6"):
        train(settings)
    monkeypatch.undo()
    progress = json.loads((settings.out / "checkpoint" / "progress.json").read_text())
    assert progress["step"] == 3
    for part in ("adapter/adapter_model", "checkpoint/trainable"):
        tensors = load_file(settings.out / f"{part}.safetensors")
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert train(settings).best_step >= 1  # and it can go on


def test_hidden_states_that_are_not_finite_are_named(
    store: Path, tiny_draft: Path, tiny_target: Path, tmp_path: Path
) -> None:
    """One infinity in one sequence, first among those that train, then among those held out."""
    parts = split_sequences(FeatureStore.open(store), config(store, tiny_draft, tmp_path))
    for number, part in enumerate(parts):
        folder = write_store(tmp_path / f"store{number}", tiny_target, tiny_draft, prompts=12)
        shard = folder / "shard-00000.safetensors"
        tensors = load_file(shard)
        start = int(tensors["offsets"][part[0] + 1]) - 12
        tensors["hidden"][start, 5] = math.inf
        save_file(tensors, shard)
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["shards"][0] |= {"sha256": hash_file(shard), "bytes": shard.stat().st_size}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        with pytest.raises(UserError, match=rf"sequence {part[0]} \(prompt \d+\) has NaN or infin"):
            train(config(folder, tiny_draft, tmp_path / f"run{number}", init="default", steps=3))


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_a_step_that_is_not_finite_moves_nothing(broken: str) -> None:
    weight = nn.Parameter(torch.ones(3))
    losses: dict[str, Callable[[], Tensor]] = {
        "loss": lambda: weight.sum() * math.inf,
        "gradient": lambda: (weight - 1).sqrt().sum(),  # 0, with an infinite gradient
    }
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    with pytest.raises(NotFiniteError, match=f"the {broken}.* is (inf|nan)"):
        training_step(Accelerator(), [losses[broken]], [weight], [optimizer], clip=1.0, bf16=False)
    assert weight.tolist() == [1, 1, 1]
