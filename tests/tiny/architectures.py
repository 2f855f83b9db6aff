"""Seeded random targets of several architectures, small enough that vLLM loads them in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.tiny.models import (
    HEAD_DIM,
    HEADS,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    POSITIONS,
    VOCAB,
    rope,
    write_tokenizer,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": POSITIONS,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}


def architectures() -> dict[str, PreTrainedConfig]:
    """The configuration of each architecture, by the name that people use."""
    import transformers as t

    mixture = {"num_experts": 4, "moe_intermediate_size": HIDDEN, **EXPERTS}
    local = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
    return {
        "Llama": t.LlamaConfig(**COMMON, rope_parameters=rope()),
        "Mistral": t.MistralConfig(**COMMON, rope_parameters=rope(), sliding_window=None),
        "Qwen2": t.Qwen2Config(**COMMON, rope_parameters=rope()),
        "Qwen3": t.Qwen3Config(**COMMON, rope_parameters=rope()),
        "Phi-3": t.Phi3Config(**COMMON, rope_parameters=rope()),
        "Gemma 3": t.Gemma3TextConfig(**COMMON, **local, query_pre_attn_scalar=HEAD_DIM),
        "Qwen3-MoE": t.Qwen3MoeConfig(**COMMON, **mixture, rope_parameters=rope()),
        "Mixtral": t.MixtralConfig(
            **COMMON, **EXPERTS, num_local_experts=4, rope_parameters=rope()
        ),
    }


def write_architecture(folder: Path, name: str, seed: int = 0, **changes: Any) -> Path:
    """A random float32 target of the architecture `name`, with tokenizer and template.

    `changes` replace fields of its config.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = architectures()[name]
    for field, value in changes.items():
        setattr(config, field, value)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
