"""Training on texts alone: the target gives their hidden states as they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from afaspec.store.read import FeatureStore
from afaspec.train.config import TrainConfig
from drafts.errors import UserError
from tests.opened import train
from tests.tiny.store import write_store

KEPT, TEXTS = "kept", "texts"


@pytest.fixture(scope="module")
def stores(
    tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path
) -> dict[str, Path]:
    """The same answers, with their states and without, and others to mix in."""
    folder, same = tmp_path_factory.mktemp("stores"), {"target": tiny_target, "draft": tiny_draft}
    return {
        KEPT: write_store(folder / KEPT, **same, dtype="float32"),
        TEXTS: write_store(folder / TEXTS, **same, dtype="float32", features="none"),
        "more": write_store(folder / "more", **same, prompts=12, word="class", features="none"),
    }


@pytest.fixture
def config(stores: dict[str, Path], tiny_draft: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    def make(out: str, store: str = TEXTS, **settings: Any) -> TrainConfig:
        defaults: dict[str, Any] = {"steps": 8, "eval_every": 4, "checkpoint_every": 4, "rank": 4}
        defaults |= {"compiled": False, "batch_size": 4, "tensorboard": False, "precision": "fp32"}
        return TrainConfig(
            store=stores[store], draft=str(tiny_draft), out=tmp_path / out, **(defaults | settings)
        )

    return make


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoint" / "trainable.safetensors")


def test_texts_alone_take_no_disk_for_states(stores: dict[str, Path]) -> None:
    kept, texts = FeatureStore.open(stores[KEPT]), FeatureStore.open(stores[TEXTS])
    assert texts.manifest.token_bytes == 5
    assert sum(s.bytes for s in texts.manifest.shards) < texts.tokens * 5 + 2000
    for i in range(len(kept)):
        for one, other in zip(texts.tokens_at(i), kept.tokens_at(i), strict=True):
            assert torch.equal(one, other)
    assert texts.roots is not None
    assert texts.prompt_hashes.tolist() == kept.prompt_hashes.tolist()
    with pytest.raises(UserError, match="holds texts alone, no hidden states"):
        texts[0]


def test_weights_are_those_of_kept_states(config: Callable[..., TrainConfig]) -> None:
    """But for rounding: states were computed beside others, and rounded to bf16.

    From a random start: one along gradients is the same but for its signs.
    """
    kept, texts = config("a", KEPT, init="default"), config("b", init="default")
    trained = train(kept), train(texts)
    assert trained[0].length == pytest.approx(trained[1].length, abs=0.05)
    for one, other in zip(rows(kept.out), rows(texts.out), strict=True):
        assert one.keys() == other.keys()
        if one["step"]:
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
    found = weights(texts.out)
    for name, expected in weights(kept.out).items():
        assert (found[name] - expected).norm() < 0.005 * expected.norm()


def test_a_run_goes_on_where_it_was(config: Callable[..., TrainConfig]) -> None:
    class StopNowError(Exception):
        pass

    def stop(row: dict[str, Any]) -> None:
        if row["step"] == 6:  # past the checkpoint of step 4
            raise StopNowError

    whole, parts = config("whole"), config("parts")
    train(whole)
    with pytest.raises(StopNowError):
        train(parts, stop)
    train(parts)
    assert rows(whole.out) == rows(parts.out)
    found = weights(parts.out)
    assert all(torch.equal(found[name], one) for name, one in weights(whole.out).items())


def test_texts_are_mixed_with_stored_states(
    config: Callable[..., TrainConfig], stores: dict[str, Path]
) -> None:
    both = config("both", KEPT, mix=[f"{stores['more']}=0.25"])
    trained = train(both)
    assert [one.name for one in trained.watched] == ["more"]
    assert "more/acceptance_length" in rows(both.out)[0]


def test_vllm_gives_them_too(config: Callable[..., TrainConfig]) -> None:
    own, served = config("own", steps=2), config("served", steps=2)
    train(own)
    more = {"states_with": "vllm", "enforce_eager": True}
    train(served.model_copy(update=more))
    for one, other in zip(rows(own.out)[1:], rows(served.out)[1:], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
