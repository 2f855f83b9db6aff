"""DSpark drafts: DFlash's block, and a Markov head that joins its tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from afaspec.store.read import FeatureStore
from afaspec.train.config import TrainConfig
from bench.stats.offline import offline_acceptance
from drafts.checkpoint.family import InitOptions
from drafts.errors import UserError
from drafts.families.dspark.module import DSparkConfig, DSparkDraft
from drafts.nn.packing import Packing
from drafts.registry import read_draft, save_draft
from drafts.target.info import read_target
from serving.speculation import require_drafter
from tests.opened import init_draft, inspect_draft, load_draft, merge, train
from tests.tiny.models import LAYER_IDS, VOCAB
from tests.tiny.store import write_store
from tests.vllm_client import VllmWorker

K = 4
KEPT = torch.arange(0, VOCAB, 2)


def write_dspark(folder: Path, target: Path, **changes: Any) -> Path:
    """A random draft in DeepSeek's layout, with a Markov head that has a say."""
    torch.manual_seed(0)
    start = init_draft("dspark", target, InitOptions(layer_ids=LAYER_IDS, kept=KEPT, max_k=K))
    assert isinstance(start.config, DSparkConfig)
    draft = DSparkDraft(replace(start.config, **changes))
    draft.load_state_dict(start.state_dict(), strict=False)
    draft.set_vocabulary_map(start.d2t)
    for weight in (draft.markov_head.markov_w1.weight, draft.markov_head.markov_w2.weight):
        torch.nn.init.normal_(weight, std=0.3)
    folder.mkdir()
    save_draft(draft, "dspark", folder, dtype=torch.float32)
    return folder


def test_sinks_and_windows_of_dflash_are_kept(tiny_target: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"sinks": True, "value_scale": 0.5, "windows": (7,), "causal": (True,)}
    folder = write_dspark(tmp_path / "draft", tiny_target, **given)
    config = load_draft(folder, tiny_target).config  # type: ignore[attr-defined]
    assert {key: getattr(config, key) for key in given} == given


@pytest.mark.parametrize("from_anchor", [True, False])
def test_rows_at_once_are_what_the_server_drafts(
    from_anchor: bool, tiny_target: Path, tmp_path: Path
) -> None:
    """Rows are compared where the text goes on with what they drafted."""
    folder = write_dspark(tmp_path / "draft", tiny_target, from_anchor=from_anchor)
    draft = load_draft(folder, tiny_target).eval()
    features = torch.randn(20, draft.feature_size)
    text = torch.randint(VOCAB, (8,)).tolist()
    drafted = draft.propose(features[:7], torch.tensor(text), K)
    text += drafted + [5] * 8
    with torch.no_grad():
        outputs = draft(features, torch.tensor(text), K, Packing.of([20], torch.tensor([3, 6, 11])))
    assert [draft.best(outputs[j][1:2], j) for j in range(K)] == drafted


def test_each_token_depends_on_the_one_before(tiny_target: Path, tmp_path: Path) -> None:
    """As vLLM samples: base logits of the block, and the bias of the token drafted last."""
    folder = write_dspark(tmp_path / "draft", tiny_target)
    draft = load_draft(folder, tiny_target).eval()
    assert isinstance(draft, DSparkDraft)
    features, ids = torch.randn(9, draft.feature_size), torch.randint(VOCAB, (10,))
    with torch.no_grad():
        block = draft.block(features, ids, K - 1, Packing.last_of(features))[0]
        base, last, expected = draft.lm_head(block), ids[-1], []
        for j in range(K):
            bias = draft.markov_head.markov_w2(draft.markov_head.markov_w1(last))
            last = draft.target_ids()[(base[j] + bias).argmax()]
            expected.append(int(last))
    assert draft.propose(features, ids, K) == expected
    plain = draft.target_ids()[base.argmax(-1)].tolist()
    assert plain != expected, "the Markov head changes nothing here"


def test_it_is_described_and_written_as_it_was(tiny_target: Path, tmp_path: Path) -> None:
    folder = write_dspark(tmp_path / "draft", tiny_target, confidence=128 + 128)
    info = inspect_draft(folder, tiny_target)
    assert (info.family, info.layout, info.largest_k) == ("dspark", "dspark", K)
    assert info.speculative_config["method"] == "dspark"
    raw = json.loads((folder / "config.json").read_text())
    assert raw["architectures"] == ["Qwen3DSparkModel"]
    assert raw["target_layer_ids"] == [i - 1 for i in LAYER_IDS]
    assert (raw["sample_from_anchor"], raw["confidence_head_with_markov"]) == (True, True)
    behind = write_dspark(tmp_path / "behind", tiny_target, from_anchor=False)
    assert inspect_draft(behind, tiny_target).largest_k == K - 1


def edited(folder: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    raw = json.loads((folder / "config.json").read_text())
    change(raw)
    (folder / "config.json").write_text(json.dumps(raw))
    return folder


def test_published_spellings_are_read_alike(tiny_target: Path, tmp_path: Path) -> None:
    """The mask token and the layers have several names; without a word the anchor is sampled."""
    folder = write_dspark(tmp_path / "draft", tiny_target)
    before = load_draft(folder, tiny_target).config  # type: ignore[attr-defined]

    def spell(raw: dict[str, Any]) -> None:
        del raw["sample_from_anchor"], raw["markov_head_type"]
        raw["architectures"] = ["DSparkDraftModel"]
        raw["dspark_noise_token_id"] = raw.pop("mask_token_id")
        raw["dspark_target_layer_ids"] = raw.pop("target_layer_ids")

    assert load_draft(edited(folder, spell), tiny_target).config == before  # type: ignore[attr-defined]


def test_the_mask_token_in_dflash_config_comes_first(tiny_target: Path, tmp_path: Path) -> None:
    """As vLLM reads it."""
    folder = write_dspark(tmp_path / "draft", tiny_target)
    edited(folder, lambda raw: raw.update(dflash_config={"mask_token_id": 9}, mask_token_id=8))
    assert load_draft(folder, tiny_target).config.mask_token_id == 9  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"markov_head_type": "gated"}, "a Markov head of the kind gated"),
        ({"dspark_draft_topk": 8}, "for the likeliest tokens alone"),
        ({"markov_rank": 0}, "markov_rank is 0"),
        ({"markov_rank": 7}, "markov_head.markov_w1.weight is"),
        ({"mask_token_id": VOCAB}, "expected a token id below"),
        ({"target_layer_ids": None}, "names no target_layer_ids"),
        (
            {"architectures": ["Gemma4DSparkModel"]},
            "of Gemma 4's layers that vLLM has another module for",
        ),
    ],
)
def test_what_vllm_computes_otherwise_is_refused(
    change: dict[str, Any], says: str, tiny_target: Path, tmp_path: Path
) -> None:
    folder = write_dspark(tmp_path / "draft", tiny_target)
    with pytest.raises(UserError, match=says):
        read_draft(edited(folder, lambda raw: raw.update(change)))


@pytest.mark.parametrize("arm", ["lora", "full"])
def test_it_adapts_and_merges(
    arm: Any, tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    base = write_dspark(tmp_path / "base", tiny_target, confidence=128)
    store = FeatureStore.open(write_store(tmp_path / "store", tiny_target, tiny_draft))
    run = train(
        TrainConfig(
            store=store.folder,
            draft=base,
            out=tmp_path / "run",
            target=tiny_target,
            arm=arm,
            learning_rate=1e-2 if arm == "lora" else 3e-3,
            steps=80,
            draft_steps=K,
            precision="fp32",
            compiled=False,
            tensorboard=False,
            eval_every=80,
        )
    )
    merged = tmp_path / "merged"
    merge(run.folder, base, merged, tiny_target)
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert "markov_head.markov_w2.weight" in changed
    assert ("markov_head.markov_w1.weight" in changed) == (arm == "full")
    assert not any(name.startswith("confidence_head") for name in changed)

    def length(folder: Path) -> float:
        draft = load_draft(folder, tiny_target).eval()
        every = (store[i] for i in range(len(store)))
        return offline_acceptance(draft, every, K, amp=False).acceptance_length

    assert length(merged) > length(base) + 0.3


def test_without_a_gpu_it_is_not_served_and_that_is_said_first(
    tiny_target: Path, tmp_path: Path, vllm_worker: VllmWorker
) -> None:
    """vLLM has it in its second model runner alone, which wants Triton."""
    folder = write_dspark(tmp_path / "draft", tiny_target)
    with pytest.raises(UserError, match="serves DSpark drafts on GPUs alone"):
        require_drafter(read_target(tiny_target), read_draft(folder))
    assert "error" in vllm_worker.serve(tiny_target, folder, K, [[5, 6, 7]], 4)
