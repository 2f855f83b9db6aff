"""A target's teacher: the logits that transformers' own model makes, whatever it does to them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from afaspec.train.objective import Batch, DraftObjective
from drafts.checkpoint.family import InitOptions
from drafts.checkpoint.load import load_causal_lm
from drafts.errors import UserError
from drafts.registry import FAMILIES, save_draft
from drafts.target.head import scaled_and_capped
from drafts.target.info import read_target
from tests.opened import init_draft, load_draft, load_embedding, load_lm_head, load_target_head
from tests.packed import alone
from tests.tiny.architectures import (
    architectures,
    multimodal,
    write_architecture,
    write_multimodal,
)
from tests.tiny.models import HIDDEN, VOCAB, write_target

FP8 = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
IDS = torch.arange(10, 40).unsqueeze(0)


@torch.no_grad()
def final_and_logits(folder: Path) -> tuple[Tensor, Tensor]:
    """What transformers' own model captures [n, d], and the logits that it makes of it [n, V]."""
    model, wrong, surplus = load_causal_lm(folder, torch.float32, "target")
    assert not wrong + surplus
    final = model.eval().get_decoder()(input_ids=IDS, use_cache=False)[0]
    return final[0], model(input_ids=IDS).logits[0]


def edit(folder: Path, change: Callable[[dict[str, Tensor]], object], **config: Any) -> Path:
    """Change a target's tensors in place, and fields of its config.json."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | config))
    return folder


@pytest.mark.parametrize("name", architectures())
def test_the_teacher_is_the_model_itself(name: str, tmp_path: Path) -> None:
    folder = write_architecture(tmp_path / "target", name)
    final, logits = final_and_logits(folder)
    head = load_target_head(folder)
    torch.testing.assert_close(head(final), logits)
    some = torch.tensor([7, 500, 3])
    torch.testing.assert_close(head.rows(some)(final), logits[:, some])


@pytest.mark.parametrize("name", multimodal())
def test_models_that_see_images_are_targets_too(name: str, tmp_path: Path) -> None:
    folder = write_multimodal(tmp_path / "target", name)
    final, logits = final_and_logits(folder)
    torch.testing.assert_close(load_target_head(folder)(final), logits)
    assert load_embedding(folder).shape == (VOCAB, HIDDEN)
    target = read_target(folder)
    assert (target.vocab_size, target.dtype) == (VOCAB, "float32")


def test_sizes_that_a_multimodal_config_leaves_out(tmp_path: Path) -> None:
    """Published ones name only what differs from transformers' defaults."""
    folder = write_multimodal(tmp_path / "target", "LLaVA")
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    for key in ("max_position_embeddings", "num_attention_heads"):
        del raw["text_config"][key]
    path.write_text(json.dumps(raw))
    target = read_target(folder)
    assert target.max_positions == 2048  # of LlamaConfig
    assert target.config["num_attention_heads"] == 32


def granite(folder: Path, scaling: float) -> Path:
    return edit(write_architecture(folder, "Granite"), lambda t: None, logits_scaling=scaling)


def test_a_scale_changes_the_loss_and_nothing_that_is_captured(tmp_path: Path) -> None:
    """Two targets of the same weights, one of whose logits are an eighth of the other's."""
    plain, scaled = granite(tmp_path / "plain", 1.0), granite(tmp_path / "scaled", 8.0)
    (final, logits), (same, smaller) = final_and_logits(plain), final_and_logits(scaled)
    torch.testing.assert_close(final, same)
    torch.testing.assert_close(logits, 8 * smaller)
    draft = init_draft("medusa", plain, InitOptions(max_k=1))
    torch.manual_seed(0)
    with torch.no_grad():
        for block in draft.blocks[0]:
            torch.nn.init.normal_(block.linear.weight, std=0.05)
    ids = IDS[0]
    batch = Batch(ids, torch.ones_like(ids).bool(), final[:, :0], final, [len(ids)])
    features = draft.features(batch.hidden, batch.final)
    drafted = draft.logits(draft(features, ids, 1, alone(len(ids)))[0], 0)[:-1].log_softmax(-1)
    losses = []
    for target, taught in ((plain, logits), (scaled, smaller)):
        objective = DraftObjective(
            draft, load_target_head(target), loss="kl", draft_steps=1, step_decay=1.0, chunk=99,
            compiled=False,
        )  # fmt: skip
        p = taught[1:-1].log_softmax(-1)
        expected = (p.exp() * (p - drafted)).sum(-1).mean()
        losses.append(float(objective(batch).detach()))
        assert losses[-1] == pytest.approx(float(expected.detach()), rel=1e-4)
    assert losses[0] > 1.3 * losses[1]


def test_one_order_of_scale_and_cap() -> None:
    logits = torch.tensor([-100.0, 0.0, 1.0, 100.0])
    expected = 3 * torch.tanh(logits * 0.5 / 3)
    torch.testing.assert_close(scaled_and_capped(logits, 0.5, 3.0), expected)


def to_fp8(matrix: Tensor, scale: Tensor) -> Tensor:
    return (matrix.float() / scale).to(torch.float8_e4m3fn)


@pytest.mark.parametrize("kind", ["matrix", "rows", "column", "blocks"])
def test_a_head_in_fp8_is_multiplied_by_its_scales(kind: str, tmp_path: Path) -> None:
    plain = load_lm_head(write_target(tmp_path / "plain")).float()
    rows = plain.abs().amax(1) / 400
    scale = {
        "matrix": plain.abs().max().reshape(1) / 400,
        "rows": rows,
        "column": rows.unsqueeze(1),
        "blocks": plain.abs().reshape(4, 128, 1, 128).amax((1, 3)) / 400,
    }[kind]
    wide = scale.reshape(-1, 1) if kind in ("rows", "column") else scale
    wide = wide.repeat_interleave(128, 0) if kind == "blocks" else wide
    stored = to_fp8(plain, wide)

    def quantize(tensors: dict[str, Tensor]) -> None:
        name = "lm_head.weight_scale_inv" if kind == "blocks" else "lm_head.weight_scale"
        tensors |= {"lm_head.weight": stored, name: scale}

    config = FP8 if kind == "blocks" else {"quantization_config": {"quant_method": "fp8"}}
    folder = edit(write_target(tmp_path / "fp8"), quantize, **config)
    head = load_target_head(folder)
    torch.testing.assert_close(head.weight, stored.float() * wide)
    assert (head.weight - plain).abs().max() < 0.05 * plain.abs().max()


def packed(tensors: dict[str, Tensor]) -> None:
    del tensors["lm_head.weight"]
    tensors["lm_head.qweight"] = torch.zeros(HIDDEN // 8, VOCAB, dtype=torch.int32)
    tensors["lm_head.scales"] = torch.ones(1, VOCAB, dtype=torch.float16)


def integers(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = torch.zeros(VOCAB, HIDDEN, dtype=torch.int8)
    tensors["lm_head.weight_scale"] = torch.ones(VOCAB, 1)


def no_scale(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)


def odd_scale(tensors: dict[str, Tensor]) -> None:
    no_scale(tensors)
    tensors["lm_head.weight_scale_inv"] = torch.ones(3, 1)


def no_head(tensors: dict[str, Tensor]) -> None:
    del tensors["lm_head.weight"]


def extra_bias(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.bias"] = torch.ones(VOCAB)


def another_size(tensors: dict[str, Tensor]) -> None:
    tensors["lm_head.weight"] = torch.zeros(VOCAB + 8, HIDDEN, dtype=torch.bfloat16)


def two_heads(tensors: dict[str, Tensor]) -> None:
    tensors["other.lm_head.weight"] = tensors["lm_head.weight"].clone()


@pytest.mark.parametrize(
    ("change", "config", "complaint"),
    [
        (packed, {}, "output layer is quantized: it is stored as lm_head.qweight"),
        (packed, {"tie_word_embeddings": True}, "output layer is quantized"),
        (integers, {}, r"lm_head.weight is quantized .* type I8 with lm_head.weight_scale"),
        (no_scale, {}, "F8_E4M3, but its config names no quantization"),
        (no_scale, FP8, "F8_E4M3 with no scale"),
        (odd_scale, FP8, r"lm_head.weight_scale_inv is \[3, 1\]"),
        (no_head, {}, "has no output layer"),
        (lambda t: None, {"tie_word_embeddings": True}, "lm_head.weight differs from it"),
        (
            extra_bias,
            {},
            "stores lm_head.bias for its .* which LlamaForCausalLM has not",
        ),
        (another_size, {}, r"lm_head.weight is \[520, 128\], the config says \[512, 128\]"),
        (two_heads, {}, "several: lm_head.weight, other.lm_head.weight"),
        (
            lambda t: None,
            {"logit_scale": 0.5},
            "LlamaForCausalLM makes .* it has logit_scale",
        ),
        (lambda t: None, {"model_type": "nobody's"}, "transformers cannot build this target"),
    ],
)
def test_heads_that_cannot_be_told_are_refused(
    change: Callable[[dict[str, Tensor]], object],
    config: dict[str, Any],
    complaint: str,
    tmp_path: Path,
) -> None:
    folder = edit(write_target(tmp_path / "target"), change, **config)
    with pytest.raises(UserError, match=complaint):
        load_target_head(folder)


def test_a_bias_that_is_missing_is_not_made_up(tmp_path: Path) -> None:
    folder = write_architecture(tmp_path / "target", "Phi")
    edit(folder, lambda tensors: tensors.pop("lm_head.bias"))
    with pytest.raises(UserError, match="lacks the bias of its output layer, which PhiForCausalLM"):
        load_target_head(folder)


def test_another_cap_than_the_known_is_refused_by_name(tmp_path: Path) -> None:
    """RecurrentGemma calls its soft cap otherwise."""
    import transformers as t

    sizes = {"num_hidden_layers": 3, "vocab_size": VOCAB, "hidden_size": HIDDEN, "lru_width": 64}
    config = t.RecurrentGemmaConfig(**sizes, logits_soft_cap=5.0)
    t.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"RecurrentGemmaForCausalLM makes .* logits_soft_cap"):
        load_target_head(tmp_path)


def test_a_tied_head_is_the_embedding_stored_twice_or_once(tmp_path: Path) -> None:
    def tie(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    twice = edit(write_target(tmp_path / "twice"), tie, tie_word_embeddings=True)
    once = edit(write_target(tmp_path / "once"), no_head, tie_word_embeddings=True)
    for folder in (twice, once):
        final, logits = final_and_logits(folder)
        torch.testing.assert_close(load_target_head(folder).float()(final), logits)


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mtp"])
def test_a_fresh_draft_scales_its_logits_as_the_target(family: str, tmp_path: Path) -> None:
    """In vLLM a draft's logits are those of its own `logit_scale`, of a shared head too."""
    target = granite(tmp_path / "target", 8.0)
    draft = init_draft(family, target, InitOptions(max_k=2))
    (tmp_path / "draft").mkdir()
    save_draft(draft, family, tmp_path / "draft", dtype=torch.float32)
    state = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected = load_target_head(target)(state)
    written = load_draft(tmp_path / "draft", target)
    beside = getattr(getattr(written, "config", None), "markov_rank", 0)  # of no token: no bias
    torch.testing.assert_close(written.logits(F.pad(state, (0, beside)), 0), expected)
