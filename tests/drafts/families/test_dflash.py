"""DFlash: rows at once are what the server computes; checkpoint formats; training and merging."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from afaspec.train.config import TrainConfig
from drafts.checkpoint.family import InitOptions
from drafts.errors import UserError
from drafts.families.dflash.module import DFlashConfig, DFlashDraft
from drafts.nn.layers import rotation
from drafts.registry import read_draft, save_draft
from tests.command import run_command
from tests.opened import (
    init_draft,
    load_draft,
    merge,
    require_compatible,
    speculative_config,
    train,
    write_like,
)
from tests.packed import alone
from tests.tiny.models import HIDDEN, LAYER_IDS, VOCAB
from tests.tiny.store import write_store
from tests.vllm_client import VllmWorker

FUSED = 3 * 32
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "three layers": {"num_layers": 3},
    "causal": {"causal": (True, True), "num_layers": 2},
    "bias": {"qkv_bias": True, "o_bias": True},
    "windows": {"windows": (3, None, 5), "num_layers": 3},
    "causal windows": {"windows": (3, None), "causal": (True, False), "num_layers": 2},
    "the target's window": {"target_window": 4},
    "half rotary": {
        "rope": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}
    },
    "wide heads": {"head_dim": 16, "num_key_value_heads": 4},
    "other target width": {"target_hidden_size": 20, "logit_scale": 0.5},
}


def make_draft(**changes: Any) -> DFlashDraft:
    config: dict[str, Any] = {
        "hidden_size": 32,
        "target_hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": 60,
        "draft_vocab_size": 40,
        "max_positions": 128,
        "layer_ids": (1, 2, 3),
        "mask_token_id": 59,
    }
    torch.manual_seed(0)
    draft = DFlashDraft(DFlashConfig(**(config | changes))).eval()
    kept = torch.randperm(60)[:40].sort().values
    draft.set_vocabulary_map(kept - torch.arange(40))
    for parameter in draft.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return draft


def as_the_server(draft: DFlashDraft, features: Tensor, ids: Tensor, k: int) -> Tensor:
    """The k outputs [k, d] after `ids`: one row, with one attention over context and block."""
    n = len(features)
    context = draft.hidden_norm(draft.fc(features))
    tokens = torch.cat([ids[-1:], torch.full((k,), draft.config.mask_token_id)])
    x = draft.embed_tokens(tokens)
    known_at = rotation(draft.rotary, context, torch.arange(n))
    own_at = rotation(draft.rotary, context, torch.arange(n, n + k + 1))
    for number, layer in enumerate(draft.layers):
        causal, window = draft.config.causal, draft.config.window(number)
        seen = torch.ones(k + 1, n + k + 1, dtype=torch.bool)
        seen = seen.tril(n) if causal and causal[number] else seen
        if window is not None:  # as many to the right as to the left
            seen = seen.triu(n - window + 1).tril(n + window - 1)
        attention, normed = layer.self_attn, layer.input_layernorm(x)
        known = attention.keys_values(context, known_at)
        own = attention.keys_values(normed, own_at)
        keys, values = (torch.cat(pair, dim=1) for pair in zip(known, own, strict=True))
        q = attention.queries(normed, own_at)
        mixed = F.scaled_dot_product_attention(
            q[None], keys[None], values[None], attn_mask=seen, enable_gqa=True
        )
        x = x + attention.o_proj(mixed[0].transpose(0, 1).flatten(1))
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return draft.norm(x)[1:]


@pytest.mark.parametrize("k", [1, 2, 5])
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("first_row", [0, 6])
def test_rows_at_once_are_what_the_server_computes(k: int, name: str, first_row: int) -> None:
    draft = make_draft(**VARIANTS[name])
    features, ids = torch.randn(14, draft.feature_size), torch.randint(60, (14,))
    with torch.no_grad():
        outputs = draft(features, ids, k, alone(14, first_row))
        assert len(outputs) == k
        assert all(output.shape == (13 - first_row, 32) for output in outputs)
        for row in range(first_row, 13):
            expected = as_the_server(draft, features[: row + 1], ids[: row + 2], k)
            at_once = torch.stack([output[row - first_row] for output in outputs])
            torch.testing.assert_close(at_once, expected, rtol=1e-4, atol=1e-5)
            said = draft.logits(expected, 0).argmax(-1)
            drafted = draft.propose(features[: row + 1], ids[: row + 2], k)
            assert drafted == draft.target_ids()[said].tolist()


@pytest.mark.parametrize("causal", [True, False])
def test_more_slots_change_what_is_drafted_unless_causal(causal: bool) -> None:
    draft = make_draft(causal=(causal,))
    features, ids = torch.randn(9, FUSED), torch.randint(60, (9,))
    with torch.no_grad():
        two, five = (draft(features, ids, k, alone(9)) for k in (2, 5))
    assert torch.allclose(two[0], five[0], atol=1e-5) == causal


def write_dflash(folder: Path, **changes: Any) -> Path:
    """A random draft in z-lab's layout as published: no embedding and no output layer of its own.

    `changes` replace entries of config.json; a dict's entries are replaced one by one.
    """
    config: dict[str, Any] = {
        "architectures": ["DFlashDraftModel"],
        "attention_bias": False,
        "block_size": 8,
        "dflash_config": {"mask_token_id": 511, "target_layer_ids": [0, 1, 2]},
        "dtype": "bfloat16",
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "layer_types": ["full_attention"] * 2,
        "max_position_embeddings": 1024,
        "model_type": "qwen3",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "num_target_layers": 4,
        "rms_norm_eps": 1e-6,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB,
    }
    for key, value in changes.items():
        config[key] = {**config.get(key, {}), **value} if isinstance(value, dict) else value
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(draft_tensors(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def draft_tensors() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def linear(rows: int, columns: int) -> Tensor:
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        return weight.to(torch.bfloat16)

    def norm(size: int = HIDDEN) -> Tensor:
        return (torch.rand(size, generator=generator) + 0.5).to(torch.bfloat16)

    tensors = {"fc.weight": linear(HIDDEN, 3 * HIDDEN), "hidden_norm.weight": norm()}
    for i in range(2):
        tensors |= {
            f"layers.{i}.input_layernorm.weight": norm(),
            f"layers.{i}.self_attn.q_proj.weight": linear(128, HIDDEN),
            f"layers.{i}.self_attn.k_proj.weight": linear(64, HIDDEN),
            f"layers.{i}.self_attn.v_proj.weight": linear(64, HIDDEN),
            f"layers.{i}.self_attn.o_proj.weight": linear(HIDDEN, 128),
            f"layers.{i}.self_attn.q_norm.weight": norm(32),
            f"layers.{i}.self_attn.k_norm.weight": norm(32),
            f"layers.{i}.post_attention_layernorm.weight": norm(),
            f"layers.{i}.mlp.gate_proj.weight": linear(2 * HIDDEN, HIDDEN),
            f"layers.{i}.mlp.up_proj.weight": linear(2 * HIDDEN, HIDDEN),
            f"layers.{i}.mlp.down_proj.weight": linear(HIDDEN, 2 * HIDDEN),
        }
    return tensors | {"norm.weight": norm()}


def write_speculators(folder: Path) -> Path:
    """The same draft in speculators' layout, with the layers' hidden states named themselves."""
    write_dflash(folder)
    path = folder / "config.json"
    inner = json.loads(path.read_text())
    for key in ("architectures", "dflash_config", "block_size"):
        del inner[key]
    config = {
        "architectures": ["DFlashSpeculator"],
        "speculators_model_type": "dflash",
        "speculators_config": {
            "algorithm": "dflash",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 7}],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "target"},
        },
        "aux_hidden_state_layer_ids": [1, 2, 3],
        "block_size": 8,
        "draft_vocab_size": VOCAB,
        "mask_token_id": 511,
        "transformer_layer_config": inner,
    }
    path.write_text(json.dumps(config))
    return folder


def test_both_layouts_are_the_same_draft(tmp_path: Path, tiny_target: Path) -> None:
    one, two = write_dflash(tmp_path / "one"), write_speculators(tmp_path / "two")
    for folder, layout in ((one, "dflash"), (two, "speculators")):
        info = read_draft(folder)
        assert (info.family, info.format) == ("dflash", layout)
        assert (info.layer_ids, info.max_k) == (LAYER_IDS, 7)
        assert info.shared == ("embed_tokens.weight", "lm_head.weight")
        require_compatible(tiny_target, folder)
    first, second = load_draft(one, tiny_target), load_draft(two, tiny_target)
    assert isinstance(first, DFlashDraft)
    assert first.config == second.config
    assert first.config.rope["rope_theta"] == 1000000
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name


def test_a_block_bounds_k(tmp_path: Path) -> None:
    folder = write_dflash(tmp_path / "draft")
    assert speculative_config(folder, 7) == {
        "method": "dflash",
        "model": str(folder),
        "num_speculative_tokens": 7,
    }
    with pytest.raises(UserError, match="drafts at most 7 tokens"):
        speculative_config(folder, 8)
    free = write_dflash(tmp_path / "free", block_size=None)
    assert read_draft(free).max_k is None


SLIDING: dict[str, Any] = {
    "layer_types": ["sliding_attention"] * 2,
    "sliding_window": 7,
    "use_sliding_window": True,
}


@pytest.mark.parametrize(
    ("changes", "causal"),
    [
        ({}, False),
        ({"dflash_config": {"causal": True}}, True),
        ({"is_causal": False, "dflash_config": {"causal": True}}, False),
        ({"is_causal": True}, True),
        (SLIDING, True),
        (SLIDING | {"dflash_config": {"causal": False}}, False),
        ({"dflash_config": {"use_swa": True, "swa_window_size": 9}}, False),
    ],
)
def test_causality_is_read_as_vllm_reads_it(
    tmp_path: Path, tiny_target: Path, changes: dict[str, Any], causal: bool
) -> None:
    draft = load_draft(write_dflash(tmp_path / "draft", **changes), tiny_target)
    assert isinstance(draft, DFlashDraft)
    assert draft.config.causal == ((True, True) if causal else ())


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, ()),
        (SLIDING, (7, 7)),
        (SLIDING | {"layer_types": ["full_attention", "sliding_attention"]}, (None, 7)),
        (SLIDING | {"layer_types": None, "max_window_layers": 1}, (None, 7)),
        (SLIDING | {"dflash_config": {"swa_window_size": 9}}, (9, 9)),
        ({"dflash_config": {"use_swa": True, "swa_window_size": 9}}, (9, 9)),
        ({"sliding_window": 7}, ()),
    ],
)
def test_windows_are_read_as_vllm_reads_them(
    tmp_path: Path, tiny_target: Path, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    draft = load_draft(write_dflash(tmp_path / "draft", **changes), tiny_target)
    assert isinstance(draft, DFlashDraft)
    assert draft.config.windows == windows
    (tmp_path / "again").mkdir()
    save_draft(draft, "dflash", tmp_path / "again", dtype=torch.float32)
    assert load_draft(tmp_path / "again", tiny_target).config == draft.config


@pytest.mark.parametrize("layout", ["dflash", "speculators"])
def test_write_like_changes_only_what_is_named(tmp_path: Path, layout: str) -> None:
    write = write_dflash if layout == "dflash" else write_speculators
    base, out = write(tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    new = torch.randn(HIDDEN, 3 * HIDDEN)
    write_like(base, out, {"fc.weight": new})
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    assert list(before) == list(after)
    assert torch.equal(after.pop("fc.weight"), new.to(torch.bfloat16))
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]), name
    assert (base / "config.json").read_bytes() == (out / "config.json").read_bytes()


@pytest.mark.parametrize("reduced", [True, False])
def test_a_fresh_draft_saves_and_loads(tmp_path: Path, tiny_target: Path, reduced: bool) -> None:
    kept = torch.arange(0, VOCAB, 2) if reduced else None
    options = InitOptions(num_layers=2, layer_ids=LAYER_IDS, kept=kept, max_k=6)
    draft = init_draft("dflash", tiny_target, options)
    assert isinstance(draft, DFlashDraft)
    assert draft.config.mask_token_id == VOCAB - 1
    save_draft(draft, "dflash", tmp_path, dtype=torch.float32)
    assert read_draft(tmp_path).max_k == 6
    again = load_draft(tmp_path, tiny_target)
    assert again.config == draft.config
    for name, value in draft.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    require_compatible(tiny_target, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dflash_config": {"mask_token_id": None}}, "names no mask token"),
        ({"dflash_config": {"mask_token_id": 512}}, "expected a token id below 512"),
        ({"dflash_config": {"target_layer_ids": []}}, "names no dflash_config.target_layer_ids"),
        ({"dflash_config": {"target_layer_ids": [1, 1, 2]}}, "expected distinct layer numbers"),
        ({"dflash_config": {"target_layer_ids": [0, 1]}}, "fc.weight is"),
        ({"num_hidden_layers": 3, "layer_types": None}, "lacks the tensor layers.2"),
        ({"num_hidden_layers": 3}, "for each of 3 layers"),
        ({"intermediate_size": 64}, "down_proj.weight is"),
        ({"draft_vocab_size": 320}, "lacks the tensor lm_head.weight"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "but sliding_window is None"),
        ({"dflash_config": {"use_swa": True}}, "but sliding_window is None"),
        (
            {"dflash_config": {"use_swa": True, "swa_window_size": 0}},
            "but dflash_config.swa_window_size is 0",
        ),
        ({"use_aux_hidden_state": False}, "use_aux_hidden_state"),
        ({"dflash_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
        ({"eagle_config": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
        (
            {"dflash_config": {"attention_sink_bias": True}},
            "lacks the tensor layers.0.self_attn.attention_sink_bias",
        ),
        ({"dflash_config": {"sample_from_anchor": True}}, "drafting from the anchor"),
        ({"is_neox_style": False}, "is_neox_style is False"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        read_draft(write_dflash(tmp_path / "draft", **changes))
    assert message in str(error.value)


@pytest.mark.parametrize("beside", [True, False])
def test_a_mask_embedding_becomes_a_row_that_vllm_takes_alike(
    beside: bool, tmp_path: Path, tiny_target: Path, vllm_worker: VllmWorker
) -> None:
    """In the layout of MiMo's draft: the embedding alone, or beside its token."""
    folder = tmp_path / "draft"
    folder.mkdir()
    plain = init_draft("dflash", tiny_target, InitOptions(max_k=3))
    save_draft(plain, "dflash", folder, dtype=torch.float32)
    token = plain.config.mask_token_id  # type: ignore[attr-defined]
    row = 2 * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(1)).bfloat16().float()
    saved = {"embedding": row, "mask_token_id": token} if beside else row
    asked = (3, [[5, 9, 200, 31], [400, 3, 3]], 12)
    without = vllm_worker.serve(tiny_target, folder, *asked)["runs"]
    torch.save(saved, folder / "mask_embedding.pt")
    raw = {"method": "dflash", "model": str(folder), "num_speculative_tokens": 3}
    expected = vllm_worker.serve(tiny_target, None, *asked, raw)["runs"]
    code, said = run_command("convert", folder, "--out", tmp_path / "none")
    assert code == 2
    assert "give --target TARGET as well" in said
    code, said = run_command("convert", folder, "--target", tiny_target, "--out", tmp_path / "made")
    assert code == 0, said
    found = load_draft(tmp_path / "made", tiny_target).get_parameter("embed_tokens.weight")
    assert torch.equal(found[token], row)
    assert vllm_worker.serve(tiny_target, tmp_path / "made", *asked)["runs"] == expected
    assert expected != without


def test_a_pickled_mask_embedding_is_refused(tmp_path: Path) -> None:
    folder = write_dflash(tmp_path / "draft")
    (folder / "mask_embedding.pt").touch()
    with pytest.raises(UserError, match="does not load pickles"):
        read_draft(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path) -> tuple[Path, Path]:
    """A base draft and a store for it."""
    folder = tmp_path_factory.mktemp("dflash")
    base = write_dflash(folder / "base")
    return base, write_store(folder / "store", tiny_target, base)


@pytest.mark.parametrize("arm", ["afa-lora", "lora", "full"])
def test_trained_and_merged(
    arm: Any, store: tuple[Path, Path], tiny_target: Path, tmp_path: Path
) -> None:
    base, features = store
    settings: dict[str, Any] = {"steps": 6, "eval_every": 6, "rank": 4, "batch_size": 4}
    settings |= {"learning_rate": 1e-2, "compiled": False, "tensorboard": False}
    train(TrainConfig(store=features, draft=base, out=tmp_path / "run", arm=arm, **settings))
    parity = merge(tmp_path / "run", None, tmp_path / "merged")
    assert parity.float32 <= 1e-5
    before = load_file(base / "model.safetensors")
    after = load_file(tmp_path / "merged" / "model.safetensors")
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    linears = {name for name in before if name.endswith("proj.weight") or name == "fc.weight"}
    assert changed >= linears
    assert (changed == linears) == (arm != "full")
    require_compatible(tiny_target, tmp_path / "merged")
