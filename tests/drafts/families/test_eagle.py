"""EAGLE: the module, its checkpoints, and the whole way from capture to a merged draft."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from afaspec.store.read import FeatureStore
from bench.stats.offline import offline_acceptance
from drafts.checkpoint.family import InitOptions
from drafts.errors import UserError
from drafts.families.eagle.module import EagleConfig, EagleDraft
from drafts.registry import read_draft, save_draft
from tests.opened import (
    init_draft,
    load_draft,
    load_embedding,
    load_lm_head,
    merge,
    require_compatible,
    write_like,
)
from tests.packed import alone
from tests.tiny.models import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, VOCAB
from tests.tiny.runs import run_losses
from tests.tiny.store import write_store

PLAIN = EagleConfig(
    hidden_size=32,
    intermediate_size=48,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    vocab_size=60,
    max_positions=128,
)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two_layers": {"num_layers": 2},
    "three_layers": {"num_layers": 3},
    "biases": {"qkv_bias": True, "o_bias": True, "mlp_bias": True},
    "the target's window": {"num_layers": 2, "target_window": 3},
    "no_gqa": {"num_key_value_heads": 4},
    "wide_heads": {"head_dim": 16},
    "logit_scale": {"logit_scale": 0.5},
    "linear_rope": {"rope": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}},
}


def make_draft(config: EagleConfig) -> EagleDraft:
    torch.manual_seed(0)
    draft = EagleDraft(config).eval()
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return draft


@pytest.mark.parametrize("name", VARIANTS)
def test_rows_at_once_equal_token_by_token(name: str) -> None:
    """Where the path is what the draft itself proposes, both ways must propose the same."""
    config = replace(PLAIN, **VARIANTS[name])
    draft, k = make_draft(config), 4
    features, prefix = torch.randn(14, 32), torch.randint(60, (9,))
    drafted = draft.propose(features[:8], prefix, k)

    path = torch.cat([prefix, torch.tensor(drafted)])  # as if the target had said the same
    for first_row in (0, 5):
        with torch.no_grad():
            outputs = draft(features[: len(path)], path, k, alone(len(path), first_row))
        row = 7 - first_row
        at_once = [draft.best(output[row : row + 1], j) for j, output in enumerate(outputs)]
        assert at_once == drafted


@pytest.mark.parametrize("name", ["plain", "three_layers"])
def test_rows_before_the_first_only_cost_less(name: str) -> None:
    draft = make_draft(replace(PLAIN, **VARIANTS[name]))
    features, ids = torch.randn(12, 32), torch.randint(60, (12,))
    whole, part = draft(features, ids, 3, alone(12)), draft(features, ids, 3, alone(12, 6))
    for all_rows, rows in zip(whole, part, strict=True):
        torch.testing.assert_close(all_rows[6:], rows, rtol=1e-4, atol=1e-4)


def test_rows_see_nothing_of_the_future() -> None:
    draft = make_draft(replace(PLAIN, num_layers=2))
    features, ids = torch.randn(12, 32), torch.randint(60, (12,))
    changed_features, changed_ids = features.clone(), ids.clone()
    changed_features[6:] += 1.0
    changed_ids[8:] = (changed_ids[8:] + 1) % 60
    before = draft(features, ids, 2, alone(12))
    after = draft(changed_features, changed_ids, 2, alone(12))
    assert torch.equal(before[0][:6], after[0][:6])
    assert torch.equal(before[1][:6], after[1][:6])
    assert not torch.equal(before[1][6], after[1][6])


def random_draft(
    folder: Path,
    target: Path,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Path:
    """A saved draft for the tiny target, with weights that are all random."""
    draft = init_draft("eagle", target, InitOptions(**options))
    if bias:
        draft = EagleDraft(replace(draft.config, qkv_bias=True, o_bias=True))
    torch.manual_seed(0)
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    folder.mkdir()
    save_draft(draft, "eagle", folder, dtype=dtype)
    return folder


def edit(folder: Path, config: dict[str, Any], tensors: dict[str, Any]) -> Path:
    """Replace entries of a checkpoint's config and tensors in place; None removes one."""
    raw, stored = json.loads((folder / "config.json").read_text()), folder / "model.safetensors"
    changed = {k: v for k, v in {**raw, **config}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(changed))
    save_file({k: v for k, v in {**load_file(stored), **tensors}.items() if v is not None}, stored)
    return folder


@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bias": True}])
def test_saved_draft_loads_again(
    options: dict[str, Any], tmp_path: Path, tiny_target: Path
) -> None:
    folder = random_draft(tmp_path / "draft", tiny_target, **options)
    info, draft = read_draft(folder), load_draft(folder, tiny_target)
    assert (info.family, info.method, info.layer_ids, info.reads) == ("eagle", "eagle", (), "final")
    assert info.shared == ("embed_tokens.weight", "lm_head.weight")
    assert torch.equal(draft.embed_tokens.weight, load_embedding(tiny_target).float())
    assert torch.equal(draft.lm_head.weight, load_lm_head(tiny_target).float())
    require_compatible(tiny_target, folder)

    (tmp_path / "again").mkdir()
    save_draft(draft, "eagle", tmp_path / "again", dtype=torch.float32)
    (tmp_path / "copy").mkdir()
    write_like(folder, tmp_path / "copy", {})
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        assert path.read_bytes() == (tmp_path / "copy" / path.name).read_bytes()


def test_an_embedding_of_its_own_is_used_and_kept(tmp_path: Path, tiny_target: Path) -> None:
    embedding = torch.randn(VOCAB, HIDDEN)
    folder = random_draft(tmp_path / "draft", tiny_target)
    edit(folder, {}, {"embed_tokens.weight": embedding})
    assert read_draft(folder).shared == ("lm_head.weight",)
    assert torch.equal(load_draft(folder, tiny_target).embed_tokens.weight, embedding)
    (tmp_path / "out").mkdir()
    write_like(folder, tmp_path / "out", {"fc.weight": torch.zeros(HIDDEN, 2 * HIDDEN)})
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert [n for n in before if not torch.equal(before[n], after[n])] == ["fc.weight"]


def test_a_config_of_type_eagle_nests_that_of_the_layers(tmp_path: Path, tiny_target: Path) -> None:
    folder = random_draft(tmp_path / "draft", tiny_target)
    draft = load_draft(folder, tiny_target)
    inner = json.loads((folder / "config.json").read_text())
    nested = {"model_type": "eagle", "architectures": ["EAGLEModel"], "model": inner}
    (folder / "config.json").write_text(json.dumps(nested))
    again = load_draft(folder, tiny_target)
    assert again.config == draft.config
    assert torch.equal(again.get_parameter("fc.weight"), draft.get_parameter("fc.weight"))


WEIGHT = torch.zeros(HIDDEN)
BAD: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "fc_bias": (r"has the tensor fc\.bias.*vLLM leaves it out", {}, {"fc.bias": WEIGHT + 1}),
    "attention_bias": (
        r"q_proj\.bias.*vLLM leaves it out",
        {},
        {"layers.0.self_attn.q_proj.bias": WEIGHT},
    ),
    "no_attention_bias": (r"lacks the tensor .*q_proj\.bias", {"bias": True}, {}),
    "own_head": (
        r"lm_head\.weight.*vLLM refuses it",
        {},
        {"lm_head.weight": torch.zeros(VOCAB, HIDDEN)},
    ),
    "input_norm": (
        r"layers\.0\.input_layernorm\.weight.*vLLM refuses it",
        {},
        {"layers.0.input_layernorm.weight": WEIGHT},
    ),
    "final_norm": (r"has the tensor norm\.weight", {}, {"norm.weight": WEIGHT}),
    "missing": (
        r"lacks the tensor layers\.0\.mlp\.up_proj",
        {},
        {"layers.0.mlp.up_proj.weight": None},
    ),
    "missing_layer": (r"lacks the tensor layers\.1\.", {"num_hidden_layers": 2}, {}),
    "wrong_size": (r"the config says \[64, 128\]", {"hidden_size": 64, "head_dim": 32}, {}),
    "wrong_heads": (r"k_proj\.weight is \[64, 128\]", {"num_key_value_heads": 4}, {}),
    "wrong_embedding": (
        r"embed_tokens\.weight is \[500, 128\]",
        {},
        {"embed_tokens.weight": torch.zeros(500, HIDDEN)},
    ),
    "other_architecture": (
        r"architecture \['Qwen2ForCausalLM'\]",
        {"architectures": ["Qwen2ForCausalLM"]},
        {},
    ),
    "activation": ("hidden_act is gelu", {"hidden_act": "gelu"}, {}),
    "half_biased": (r"lacks the tensor .*q_proj\.bias", {"qkv_bias": True}, {}),
    "mlp_bias": (r"lacks the tensor .*mlp\.gate_proj\.bias", {"mlp_bias": True}, {}),
    "not_causal": ("is_causal is false", {"is_causal": False}, {}),
    "layer_types": (
        "vLLM counts from the target's first layer",
        {"layer_types": ["sliding_attention"], "sliding_window": 8},
        {},
    ),
    "qwen": ("qwen2 and qwen3 imply it", {"model_type": "qwen2"}, {}),
    "no_width": ("lacks hidden_size", {"hidden_size": None}, {}),
}


@pytest.mark.parametrize("name", BAD)
def test_damaged_checkpoints_are_refused(name: str, tmp_path: Path, tiny_target: Path) -> None:
    expected, config, tensors = BAD[name]
    folder = edit(random_draft(tmp_path / "draft", tiny_target), config, tensors)
    with pytest.raises(UserError, match=expected):
        read_draft(folder)


def test_a_reduced_vocabulary_is_refused(tiny_target: Path) -> None:
    with pytest.raises(UserError, match="no vocabulary map for EAGLE"):
        init_draft("eagle", tiny_target, InitOptions(kept=torch.arange(100)))


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> Path:
    """Far from what the target says, so that there is much to learn."""
    folder = tmp_path_factory.mktemp("eagle") / "draft"
    return random_draft(folder, tiny_target, dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, draft: Path) -> Path:
    return write_store(tmp_path_factory.mktemp("eagle") / "store", tiny_target, draft)


def test_capture_keeps_the_final_state_only(store: Path) -> None:
    opened = FeatureStore.open(store)
    assert opened.manifest.layer_ids == ()
    assert opened[0].hidden.shape == (len(opened[0]), 0)
    for shard in opened.manifest.shards:
        assert shard.bytes < shard.tokens * (2 * HIDDEN + 5) + 2000  # final, id, mask; the header


@pytest.mark.parametrize("arm", ["afa-lora", "lora", "full"])
def test_every_arm_learns_and_merges(
    arm: str, store: Path, draft: Path, tiny_target: Path, tmp_path: Path
) -> None:
    rate = 1e-3 if arm == "full" else 1e-2
    losses = run_losses(store, draft, tmp_path / "run", arm=arm, learning_rate=rate)
    assert losses[-1] < 0.9 * losses[0]
    merged = tmp_path / "merged"
    parity = merge(tmp_path / "run", None, merged)
    assert parity.float32 <= 1e-5
    assert parity.stored <= 0.05  # bf16 weights: three significant digits each
    norms = 0 if arm == "full" else 1
    assert (parity.changed_tensors, parity.untouched_tensors) == (9 - norms, norms)
    assert (merged / "config.json").read_bytes() == (draft / "config.json").read_bytes()
    require_compatible(tiny_target, merged)
    opened = FeatureStore.open(store)
    measured = offline_acceptance(load_draft(merged, tiny_target), [opened[i] for i in range(4)], 3)
    assert measured.acceptance_length >= 1


def test_the_target_head_cannot_be_trained(store: Path, draft: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="shares lm_head with the target"):
        run_losses(store, draft, tmp_path / "run", arm="lora", lm_head=True)


def test_biases_as_eagle_stores_them(tmp_path: Path, tiny_target: Path) -> None:
    """EAGLE's own `bias` is that of `fc`, zeros as published; vLLM makes one of o_proj of it."""
    folder = random_draft(tmp_path / "draft", tiny_target)
    sizes = {"q": HEADS * HEAD_DIM, "k": KV_HEADS * HEAD_DIM, "v": KV_HEADS * HEAD_DIM}
    biases = {f"layers.0.self_attn.{n}_proj.bias": torch.randn(s) for n, s in sizes.items()}
    edit(folder, {"bias": True, "qkv_bias": True}, {"fc.bias": torch.zeros(HIDDEN), **biases})
    info = read_draft(folder)
    (warning,) = info.warnings
    assert "asks for o_proj.bias" in warning
    draft = load_draft(folder, tiny_target)
    for name, value in biases.items():
        assert torch.equal(draft.get_parameter(name), value)
    assert draft.layers[0].self_attn.o_proj.bias is None

    (tmp_path / "out").mkdir()
    write_like(folder, tmp_path / "out", {"fc.weight": torch.zeros(HIDDEN, 2 * HIDDEN)})
    mended = read_draft(tmp_path / "out")
    assert mended.warnings == ()
    assert load_draft(tmp_path / "out", tiny_target).config == draft.config
