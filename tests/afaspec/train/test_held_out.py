"""What is measured on held-out sequences, what it is called, and against what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from afaspec.capture.config import CaptureConfig
from afaspec.store.read import FeatureStore
from afaspec.train.arm import decay_groups
from afaspec.train.config import TrainConfig
from afaspec.train.held_out import doubts, target_choice
from afaspec.train.loader import draw, split_sequences
from afaspec.train.mix import Part
from bench.stats.offline import offline_acceptance, offline_agreement
from drafts.checkpoint.load import load_causal_lm
from drafts.errors import UserError
from drafts.target.info import read_target
from tests.opened import capture, load_draft, load_lm_head, train
from tests.tiny.architectures import write_architecture
from tests.tiny.store import write_store

K = 2


def config(store: Path, draft: Path, out: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "steps": 4, "eval_every": 2, "batch_size": 4, "rank": 4, "precision": "fp32",
        "compiled": False, "tensorboard": False, "draft_steps": K, "eval_fraction": 0.3,
    }  # fmt: skip
    return TrainConfig(store=store, draft=draft, out=out, **(settings | changes))


@pytest.fixture(scope="module")
def greedy(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path) -> Path:
    folder = tmp_path_factory.mktemp("greedy") / "store"
    return write_store(folder, tiny_target, tiny_draft, prompts=12)


@pytest.fixture(scope="module", params=["sampled", "given"])
def other(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_target: Path,
    tiny_draft: Path,
) -> Path:
    """A store of responses that the target would not give at temperature 0."""
    folder = tmp_path_factory.mktemp(request.param) / "store"
    how: dict[str, Any] = {"sampled": {"temperature": 1.0}, "given": {"use_responses": True}}
    return write_given(folder, tiny_target, tiny_draft, **how[request.param])


def write_given(folder: Path, target: Path, draft: Path, **how: Any) -> Path:
    """A store of prompts that come with responses."""
    rows = [{"prompt": f"def f{i}(x)", "response": "while True: pass" * 3} for i in range(12)]
    prompts = folder.with_suffix(".jsonl")
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = CaptureConfig(
        target=str(target), prompts=str(prompts), out=folder, draft=draft, batch_size=8,
        device="cpu", dtype="float32", **{"max_new_tokens": 20, **how},
    )  # fmt: skip
    capture(settings)
    return folder


def metrics(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_responses_that_are_not_greedy_have_agreement_not_acceptance(
    other: Path, tiny_draft: Path, tiny_target: Path, tmp_path: Path
) -> None:
    settings = config(other, tiny_draft, tmp_path / "run")
    said: list[str] = []
    trained = train(settings, note=said.append)
    assert trained.measure == "agreement"
    assert said[0].startswith("Base draft: held-out teacher-forced agreement length ")
    texts = [(settings.out / name).read_text() for name in ("metrics.jsonl", "manifest.json")]
    assert not any("acceptance" in text for text in texts)

    store = FeatureStore.open(other)
    held = [store[index] for index in split_sequences(store, settings)[1]]
    head = load_lm_head(tiny_target).float()
    likeliest = []
    for sequence in held:
        chosen = [int((head @ state.float()).argmax()) for state in sequence.final[:-1]]
        likeliest.append(torch.tensor([int(sequence.input_ids[0]), *chosen]))
    draft = load_draft(tiny_draft, tiny_target)
    expected = offline_agreement(draft, held, likeliest, K, amp=False)
    assert metrics(settings.out)[0]["agreement_length"] == expected.acceptance_length
    manifest = json.loads((settings.out / "manifest.json").read_text())
    assert manifest["base_agreement_length"] == expected.acceptance_length
    assert manifest["held_out_agreement_length"] == trained.length


def test_the_base_draft_is_measured_first(
    greedy: Path, tiny_draft: Path, tiny_target: Path, tmp_path: Path
) -> None:
    """Whatever the arm begins with: PiSSA's adapters are not zero, AFA's are not linear."""
    store = FeatureStore.open(greedy)
    for number, how in enumerate(({}, {"arm": "afa-lora", "init": "pissa"}, {"arm": "full"})):
        settings = config(greedy, tiny_draft, tmp_path / str(number), learning_rate=1e-9, **how)
        held = [store[index] for index in split_sequences(store, settings)[1]]
        base = offline_acceptance(load_draft(tiny_draft, tiny_target), held, K, amp=False)
        trained = train(settings)
        assert metrics(settings.out)[0] == {
            "step": 0,
            "acceptance_length": base.acceptance_length,
            "per_position": base.per_position.tolist(),
        }
        assert trained.base_length == base.acceptance_length
        manifest = json.loads((settings.out / "manifest.json").read_text())
        assert manifest["better_than_base"] == (trained.length > base.acceptance_length)


def test_a_base_that_is_almost_never_right_is_doubted(
    greedy: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    train(config(greedy, tiny_draft, tmp_path / "run"), note=said.append)
    (doubt,) = (text for text in said if text.startswith("Warning: the base draft's first token"))
    assert "layer ids here: 1, 2, 3" in doubt
    assert doubts(FeatureStore.open(greedy), [0.45, 0.2]) is None


def test_responses_too_short_to_measure_are_refused(
    tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    store = write_given(tmp_path / "store", tiny_target, tiny_draft, max_new_tokens=3)
    settings = config(store, tiny_draft, tmp_path / "run", draft_steps=3)
    with pytest.raises(UserError, match="holds no held-out response of 4 tokens or more"):
        train(settings)
    train(settings.model_copy(update={"draft_steps": 2, "out": tmp_path / "shorter"}))


def test_norms_and_biases_do_not_decay(tiny_draft: Path, tiny_target: Path) -> None:
    draft = load_draft(tiny_draft, tiny_target)
    groups = decay_groups(list(draft.parameters()), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert {p.ndim for p in groups[0]["params"]} == {2}
    assert {p.ndim for p in groups[1]["params"]} == {1}
    assert sum(len(group["params"]) for group in groups) == len(list(draft.parameters()))


def test_an_epoch_has_the_order_that_it_always_had(
    greedy: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    settings = config(greedy, tiny_draft, tmp_path, batch_size=3, seed=2)
    ids = [10 * i for i in range(7)]
    numbers = np.array(ids, np.int32)
    domain = Part("", FeatureStore.open(greedy), numbers, numbers[:0])
    for batch in range(6):
        expected = []
        for i in range(3 * batch, 3 * batch + 3):
            epoch, offset = divmod(i, len(ids))
            generator = torch.Generator().manual_seed(2 * 1_000_003 + epoch)
            expected.append(ids[torch.randperm(len(ids), generator=generator)[offset]])
        assert [index for _, index in draw([domain], settings, batch)] == expected


def test_the_targets_choice_is_that_of_its_own_logits(tmp_path: Path) -> None:
    """Of a target whose output layer has a bias."""
    target = write_architecture(tmp_path / "target", "Phi")
    model = load_causal_lm(target, torch.float32, "target")[0].eval()
    ids = torch.arange(10, 90).unsqueeze(0)
    with torch.no_grad():
        final = model.get_decoder()(input_ids=ids, use_cache=False)[0]
        said = model(input_ids=ids).logits[0].argmax(-1)
    choose = target_choice(read_target(target), torch.device("cpu"), bf16=False)
    assert torch.equal(choose(final[0]), said)
    assert not torch.equal((final[0] @ model.lm_head.weight.T).argmax(-1), said)
