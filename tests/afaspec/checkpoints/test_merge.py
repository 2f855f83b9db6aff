"""Merging: parity, untouched bytes, and vLLM-ready output in the base's own format."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from afaspec.checkpoints.merge import ROUNDINGS, load_result, merged_weights
from afaspec.train.config import TrainConfig
from drafts.errors import UserError
from tests.drafts.test_registry import speculators_draft
from tests.opened import load_draft, merge, require_compatible, train
from tests.tiny.store import write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path) -> Path:
    return write_store(tmp_path_factory.mktemp("merge") / "store", tiny_target, tiny_draft)


def run(store: Path, draft: Path, out: Path, **settings: Any) -> Path:
    defaults: dict[str, Any] = {"steps": 8, "eval_every": 8, "rank": 4, "batch_size": 4}
    defaults |= {"learning_rate": 1e-2, "compiled": False, "tensorboard": False}
    train(TrainConfig(store=store, draft=draft, out=out, **(defaults | settings)))
    return out


@pytest.mark.parametrize("arm", ["lora", "afa-lora", "full"])
@pytest.mark.parametrize("layout", ["eagle3", "speculators"])
def test_merged_draft_is_the_trained_one(
    arm: str, layout: str, store: Path, tiny_draft: Path, tiny_target: Path, tmp_path: Path
) -> None:
    base = tiny_draft if layout == "eagle3" else speculators_draft(tmp_path / "base")
    trained = run(store, base, tmp_path / "run", arm=arm)
    merged = tmp_path / "merged"
    parity = merge(trained, None, merged)
    assert parity.float32 <= 1e-5
    assert parity.stored <= 0.05  # bf16 weights: three significant digits each
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert list(before) == list(after)
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert len(changed) == parity.changed_tensors > 0
    assert "d2t" not in changed
    assert "t2d" not in changed
    assert "embed_tokens.weight" not in changed
    assert (base / "config.json").read_bytes() == (merged / "config.json").read_bytes()
    require_compatible(tiny_target, merged)


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_rounding_that_a_large_update_makes_is_no_fault(
    scale: float, store: Path, tiny_draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much is rounded depends on the processor: with no tolerance but what was measured."""
    trained = run(store, tiny_draft, tmp_path / "run", arm="lora")
    file = trained / "adapter" / "adapter_model.safetensors"
    save_file({n: w * (scale if "lora_B" in n else 1) for n, w in load_file(file).items()}, file)
    monkeypatch.setattr("afaspec.checkpoints.merge.TOLERANCE", 0.0)
    parity = merge(trained, None, tmp_path / "merged")
    assert 0 < parity.float32 <= ROUNDINGS * parity.rounding


@pytest.mark.parametrize("error", [1e-3, -1e-3])
def test_a_merge_that_is_wrong_is_refused(
    error: float, store: Path, tiny_draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(adapted: Any) -> dict[str, torch.Tensor]:
        weights = merged_weights(adapted)
        name = next(name for name in weights if name.endswith("o_proj.weight"))
        return weights | {name: weights[name] * (1 + error)}

    trained = run(store, tiny_draft, tmp_path / "run", arm="lora")
    monkeypatch.setattr("afaspec.checkpoints.merge.merged_weights", wrong)
    with pytest.raises(UserError, match="differs from the adapter"):
        merge(trained, None, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_refused(
    value: float, store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    trained = run(store, tiny_draft, tmp_path / "run", arm="lora")
    file = trained / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    weights[next(name for name in weights if "lora_B" in name)][0, 0] = value
    save_file(weights, file)
    with pytest.raises(UserError, match=r"lora_B.* values that are NaN or infinite"):
        merge(trained, None, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_checkpoint_from_before_the_end_of_annealing_is_refused(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    trained = run(store, tiny_draft, tmp_path / "run", arm="afa-lora")
    record = json.loads((trained / "adapter" / "annealing.json").read_text())
    (trained / "adapter" / "annealing.json").write_text(json.dumps(record | {"beta": 0.25}))
    with pytest.raises(UserError, match=r"beta = 0\.25"):
        merge(trained, None, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_stock_peft_adapter_merges(
    store: Path, tiny_draft: Path, tiny_target: Path, tmp_path: Path
) -> None:
    trained = run(store, tiny_draft, tmp_path / "run", arm="lora")
    bare = shutil.copytree(trained / "adapter", tmp_path / "bare")
    (bare / "annealing.json").unlink()
    parity = merge(bare, tiny_draft, tmp_path / "merged", tiny_target)
    assert parity.float32 <= 1e-5


def test_merging_again_gives_the_same_bytes(store: Path, tiny_draft: Path, tmp_path: Path) -> None:
    trained = run(store, tiny_draft, tmp_path / "run", arm="lora")
    merge(trained, None, tmp_path / "one")
    merge(trained, None, tmp_path / "two")
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_float32_base_keeps_every_bit_of_the_merge(
    store: Path, tiny_draft: Path, tiny_target: Path, tmp_path: Path
) -> None:
    from drafts.registry import save_draft

    base = tmp_path / "base"
    base.mkdir()
    save_draft(load_draft(tiny_draft, tiny_target), "eagle3", base, dtype=torch.float32)
    trained = run(store, base, tmp_path / "run", arm="afa-lora", init="pissa")
    parity = merge(trained, None, tmp_path / "merged")
    assert parity.stored == parity.float32 <= 1e-5
    adapted = load_result(load_draft(base, tiny_target), trained / "adapter")
    assert any("lora_" in name for name, _ in adapted.named_parameters())
