"""Training: arms, fairness of the data, resuming, and what a run leaves behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import GradientState
from safetensors.torch import load_file

from afaspec.adapters.afa import read_record
from afaspec.store.read import FeatureStore
from afaspec.train.arm import learning_rate
from afaspec.train.config import DEFAULT_LEARNING_RATES, MANY_PASSES, SMALL_DATA_RATES, TrainConfig
from afaspec.train.loader import draw, split_sequences
from afaspec.train.mix import Part
from afaspec.train.objective import DraftObjective, collate
from bench.prompts.trained_on import read_roots
from drafts.errors import UserError
from tests.opened import load_draft, load_target_head, merge, train
from tests.packed import alone
from tests.tiny.store import write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path) -> Path:
    return write_store(tmp_path_factory.mktemp("train") / "store", tiny_target, tiny_draft)


NONE = np.empty(0, np.int32)


def config(store: Path, draft: Path, out: Path, **settings: Any) -> TrainConfig:
    defaults: dict[str, Any] = {"steps": 12, "eval_every": 4, "checkpoint_every": 4, "rank": 4}
    defaults |= {"compiled": False, "batch_size": 4, "eval_fraction": 0.2, "tensorboard": False}
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
    assert trained.length >= 1.0
    assert ("beta" in rows[0]) == (arm == "afa-lora")
    if arm == "afa-lora":
        assert rows[0]["beta"] == 1.0
        assert rows[-1]["beta"] == 0.0
        assert read_record(trained.result).beta == 0.0
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["trainable_parameters"] < manifest["draft_parameters"]


@pytest.mark.parametrize("there", [True, False])
def test_bf16_is_taken_where_the_processor_has_it(
    there: bool, store: Path, tiny_draft: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("afaspec.train.config.has_bf16", lambda device: there)
    train(config(store, tiny_draft, tmp_path / "run", steps=1))
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())
    assert recorded["precision"] == ("bf16" if there else "fp32")
    other = config(
        store, tiny_draft, tmp_path / "run", steps=1, precision="fp32" if there else "bf16"
    )
    with pytest.raises(UserError, match="a run with another precision"):
        train(other)


RECIPES: dict[str, dict[str, Any]] = {
    "lora": {"arm": "lora"},
    "afa-lora": {"arm": "afa-lora"},
    "full": {"arm": "full"},
    "random": {"arm": "lora", "init": "default"},
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


def test_few_sequences_seen_often_get_a_lower_rate(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    ids = list(range(len(FeatureStore.open(store))))
    passes = config(store, tiny_draft, tmp_path / "run").steps * 4 / 8
    assert passes < MANY_PASSES < 4 * passes
    for count, peak in ((8, DEFAULT_LEARNING_RATES["lora"]), (2, SMALL_DATA_RATES["lora"])):
        rows: list[dict[str, Any]] = []
        out = tmp_path / str(count)
        train(config(store, tiny_draft, out), rows.append, split=(ids[:count], ids[-2:]))
        assert max(row["lr"] for row in rows) == pytest.approx(peak)
        train(config(store, tiny_draft, out), split=(ids[:count], ids[-2:]))  # and goes on


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
    parts = [Part("", FeatureStore.open(store), np.arange(20, dtype=np.int32), NONE)]
    for step in range(6):
        halves = draw(parts, small, 2 * step) + draw(parts, small, 2 * step + 1)
        assert draw(parts, big, step) == halves


def test_order_is_seeded_and_epochs_skip_nothing(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    settings = config(store, tiny_draft, tmp_path, batch_size=5)
    ids = list(range(20))
    parts = [Part("", FeatureStore.open(store), np.array(ids, np.int32), NONE)]
    epoch = [i for batch in range(4) for _, i in draw(parts, settings, batch)]
    assert sorted(epoch) == ids
    assert epoch != ids
    assert draw(parts, settings, 0) != draw(parts, settings, 4)
    other = settings.model_copy(update={"seed": 1})
    assert draw(parts, other, 0) != draw(parts, settings, 0)


def test_held_out_sequences_are_never_trained_on(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    settings = config(store, tiny_draft, tmp_path)
    opened = FeatureStore.open(store)
    ids, held = split_sequences(opened, settings)
    assert not set(ids) & set(held)
    assert sorted([*ids, *held]) == list(range(24))
    other = settings.model_copy(update={"seed": 5, "arm": "lora"})
    for side, again in zip((ids, held), split_sequences(opened, other), strict=True):
        assert list(again) == list(side)


def test_a_run_and_its_merged_draft_say_what_they_were_trained_on(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    small: dict[str, Any] = {"steps": 1, "eval_every": 1, "precision": "fp32"}
    settings = config(store, tiny_draft, tmp_path / "run", **small)
    opened = FeatureStore.open(store)
    ids, held = split_sequences(opened, settings)
    roots = opened.roots
    assert roots is not None
    trained = train(settings)
    assert read_roots(trained.folder) == {roots[i] for i in ids}
    merge(trained.folder, tiny_draft, tmp_path / "merged")
    assert read_roots(tmp_path / "merged") == {roots[i] for i in ids}
    more = config(store, tmp_path / "merged", tmp_path / "more", **small)
    assert read_roots(train(more, split=(held, ids[:1])).folder) == set(roots)


def test_learning_rate_warms_up_and_ends_at_zero(
    store: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    settings = config(store, tiny_draft, tmp_path, steps=100, warmup=0.1)
    rates = [learning_rate(settings, 0.5, step) for step in range(100)]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == rates[9] == pytest.approx(0.5)
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.001


def test_objective_counts_response_tokens_the_draft_can_say(
    store: Path, tiny_draft: Path, tiny_target: Path
) -> None:
    """The loss by its definition, one row at a time."""
    draft = load_draft(tiny_draft, tiny_target).eval()
    head = load_target_head(tiny_target).float()
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
            normed = draft(s.hidden.float(), s.input_ids, 2, alone(len(s)))[j]
            for t in range(len(s) - j - 2):
                token = int(s.input_ids[t + j + 2])
                if not s.loss_mask[t + j + 2] or draft.t2d[token] < 0:
                    continue
                p = head(s.final[t + j + 1].float())[draft.target_ids()].log_softmax(-1)
                q = draft.logits(normed[t], j).log_softmax(-1)
                rows.append(float((p.exp() * (p - q)).sum().detach()))
        expected += weight * sum(rows) / len(rows)
    assert float(objective(batch).detach()) == pytest.approx(expected / 1.5, rel=1e-4)
