"""Training: arms, fairness of the data, resuming, and what a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import GradientState
from safetensors.torch import load_file

from afaspec.adapter import read_record
from afaspec.merging import load_result, merge
from afaspec.objective import DraftObjective, collate
from afaspec.store import FeatureStore
from afaspec.train_arm import learning_rate
from afaspec.train_config import TrainConfig
from afaspec.train_data import draw, split_sequences
from afaspec.training import train
from bench.offline import offline_acceptance
from drafts.checkpoint import load_draft
from drafts.target import load_lm_head
from tests.tiny_store import write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path) -> Path:
    return write_store(tmp_path_factory.mktemp("train") / "store", tiny_target, tiny_draft)


def config(store: Path, draft: Path, out: Path, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"steps": 12, "eval_every": 4, "checkpoint_every": 4, "rank": 4}
    defaults |= {"compiled": False, "batch_size": 4, "validation": 0.2, "tensorboard": False}
    return TrainConfig(store=store, draft=draft, out=out, **(defaults | settings))


def result(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint" / "trainable.safetensors")


@pytest.mark.parametrize("arm", ["lora", "afa-lora", "full"])
def test_every_arm_learns(arm: str, store: Path, tiny_draft: Path, tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = []
    rate = 1e-3 if arm == "full" else 1e-2
    settings = config(
        store, tiny_draft, tmp_path / "run", arm=arm, steps=30, learning_rate=rate, eval_every=30
    )
    trained = train(settings, rows.append)
    assert rows[-1]["loss"] < 0.97 * rows[0]["loss"]
    assert trained.result.exists()
    assert trained.acceptance_length >= 1.0
    assert ("beta" in rows[0]) == (arm == "afa-lora")
    if arm == "afa-lora":
        assert rows[0]["beta"] == 1.0
        assert rows[-1]["beta"] == 0.0
        assert read_record(trained.result).beta == 0.0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["trainable_parameters"] < manifest["draft_parameters"]


RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"arm": "lora"},
    "afa-lora": {"arm": "afa-lora"},
    "full": {"arm": "full"},
    "cycles": {"arm": "afa-lora", "cycles": 3},
    "gradient": {"arm": "afa-lora", "cycles": 2, "init": "gradient"},
}


@pytest.mark.parametrize("recipe", RECIPES)
def test_stopped_and_resumed_is_bit_for_bit_the_same(
    recipe: str, store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    class StopNowError(Exception):
        pass

    def stop_at(step: int) -> Any:
        def report(row: dict[str, Any]) -> None:
            if row["step"] == step:
                raise StopNowError

        return report

    settings = RECIPES[recipe] | {"dropout": 0.1}
    whole = config(store, tiny_draft, tmp_path / "whole", **settings)
    train(whole)
    parts = config(store, tiny_draft, tmp_path / "parts", **settings)
    for step in (3, 7, 10):
        with pytest.raises(StopNowError):
            train(parts, stop_at(step))
    train(parts)
    one, two = result(whole.out), result(parts.out)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert (whole.out / "metrics.jsonl").read_text() == (parts.out / "metrics.jsonl").read_text()
    kind = "weights" if recipe == "full" else "adapter"
    for path in (whole.out / kind).glob("*.safetensors"):
        assert path.read_bytes() == (parts.out / kind / path.name).read_bytes()


@pytest.mark.parametrize("arm", ["lora", "afa-lora"])
def test_the_result_of_cycles_merges_to_what_was_trained(
    arm: str, store: Path, tiny_draft: Path, tiny_target: Path, tmp_path: Path
) -> None:
    """The draft in training holds what was folded; the saved adapter of rank 4 x 3 is the sum."""
    settings = config(
        store, tiny_draft, tmp_path / "run", arm=arm, cycles=3, eval_every=12, precision="fp32"
    )
    trained = train(settings)
    assert json.loads((trained.result / "adapter_config.json").read_text())["r"] == 12
    parity = merge(trained.folder, tiny_draft, tmp_path / "merged", tiny_target)
    assert parity.float32 <= 1e-5
    opened = FeatureStore.open(store)
    _, held = split_sequences(len(opened), settings)
    adapted = load_result(load_draft(tiny_draft, tiny_target), trained.result)
    measured = offline_acceptance(adapted, (opened[i] for i in held), 3, amp=False)
    assert measured.acceptance_length == pytest.approx(trained.acceptance_length, abs=1e-9)


def test_adapters_can_begin_along_the_gradient(
    store: Path, tiny_draft: Path, tiny_target: Path, tmp_path: Path
) -> None:
    """Directions of a gradient are orthonormal, and a random A is not; the draft is unchanged."""
    still = {"arm": "lora", "learning_rate": 1e-12, "steps": 3, "eval_every": 3}
    for init in ("default", "gradient"):
        trained = train(config(store, tiny_draft, tmp_path / init, init=init, **still))
        for name, tensor in load_file(trained.result / "adapter_model.safetensors").items():
            if "lora_A" in name:
                apart = (tensor @ tensor.T - torch.eye(len(tensor))).abs().max()
                assert (apart < 1e-3) == (init == "gradient")
    parity = merge(tmp_path / "gradient", tiny_draft, tmp_path / "merged", tiny_target)
    assert parity.float32 <= 1e-5


def test_cycles_warm_up_again_under_one_cosine(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    whole = config(store, tiny_draft, tmp_path, steps=100, cycles=4, warmup=0.2, learning_rate=1.0)
    rates = [learning_rate(whole, step) for step in range(100)]
    for start in (0, 25, 50, 75):
        assert rates[start] < rates[start + 4]
    assert [max(rates[s : s + 25]) for s in (0, 25, 50, 75)] == sorted(
        (max(rates[s : s + 25]) for s in (0, 25, 50, 75)), reverse=True
    )


def test_it_learns_where_another_trainer_left_off_between_two_steps(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    """accelerate's state is one for the process, and transformers' Trainer leaves it like this."""
    rows: list[dict[str, Any]] = []
    state = GradientState()
    state._set_sync_gradients(False)
    try:
        settings = config(
            store, tiny_draft, tmp_path / "run", arm="afa-lora", steps=20, learning_rate=1e-2
        )
        trained = train(settings, rows.append)
    finally:
        state._set_sync_gradients(True)
    assert rows[-1]["loss"] < 0.97 * rows[0]["loss"]
    assert rows[-1]["beta"] == 0.0
    assert trained.result.exists()


def test_micro_batches_add_up(store: Path, tiny_draft: Path, tmp_path: Path) -> None:
    """Two micro-batches of 4 see the sequences that one batch of 8 sees."""
    big = config(store, tiny_draft, tmp_path, batch_size=8)
    small = config(store, tiny_draft, tmp_path, batch_size=4, accumulation=2)
    ids = list(range(20))
    for step in range(6):
        halves = draw(ids, small, 2 * step) + draw(ids, small, 2 * step + 1)
        assert draw(ids, big, step) == halves


def test_order_is_seeded_and_epochs_skip_nothing(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    settings = config(store, tiny_draft, tmp_path, batch_size=5)
    ids = list(range(20))
    epoch = [i for batch in range(4) for i in draw(ids, settings, batch)]
    assert sorted(epoch) == ids
    assert epoch != ids
    assert draw(ids, settings, 0) != draw(ids, settings, 4)
    other = settings.model_copy(update={"seed": 1})
    assert draw(ids, other, 0) != draw(ids, settings, 0)


def test_held_out_sequences_are_never_trained_on(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    settings = config(store, tiny_draft, tmp_path)
    ids, held = split_sequences(24, settings)
    assert not set(ids) & set(held)
    assert sorted(ids + held) == list(range(24))
    other = settings.model_copy(update={"seed": 5, "arm": "lora"})
    assert split_sequences(24, other) == (ids, held)


def test_learning_rate_warms_up_and_ends_at_zero(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    settings = config(store, tiny_draft, tmp_path, steps=100, warmup=0.1, learning_rate=0.5)
    rates = [learning_rate(settings, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == rates[9] == pytest.approx(0.5)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.001


def test_objective_counts_response_tokens_the_draft_can_say(
    store: Path, tiny_draft: Path, tiny_target: Path
) -> None:
    """The loss by its definition, one row at a time."""
    draft = load_draft(tiny_draft, tiny_target).eval()
    head = load_lm_head(tiny_target).float()
    opened = FeatureStore.open(store)
    batch = collate([opened[i] for i in (0, 5)])
    batch.hidden, batch.final = batch.hidden.float(), batch.final.float()
    objective = DraftObjective(
        draft, head, loss="kl", draft_steps=2, step_decay=0.5, chunk=7, compiled=False
    )
    expected = 0.0
    for j, weight in enumerate((1.0, 0.5)):
        rows = []
        for i in (0, 5):
            s = opened[i]
            normed = draft(s.hidden.float().unsqueeze(0), s.input_ids.unsqueeze(0), 2)[j][0]
            for t in range(len(s) - j - 2):
                token = int(s.input_ids[t + j + 2])
                if not s.loss_mask[t + j + 2] or draft.t2d[token] < 0:
                    continue
                p = (head @ s.final[t + j + 1].float())[draft.target_ids()].log_softmax(-1)
                q = draft.logits(normed[t], j).log_softmax(-1)
                rows.append(float((p.exp() * (p - q)).sum().detach()))
        expected += weight * sum(rows) / len(rows)
    assert float(objective(batch).detach()) == pytest.approx(expected / 1.5, rel=1e-4)
