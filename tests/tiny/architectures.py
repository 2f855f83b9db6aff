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
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "output_router_logits": False}


def architectures() -> dict[str, PreTrainedConfig]:
    """The configuration of each architecture, by the name that people use."""
    import transformers as t

    mixture = {"num_experts": 4, "moe_intermediate_size": HIDDEN, **EXPERTS}
    local = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
    without_width = {key: value for key, value in COMMON.items() if key != "intermediate_size"}
    scale = {"residual_multiplier": 0.5, "attention_multiplier": 0.25, "embedding_multiplier": 3.0}
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
        # not in docs/architectures.md's table: what these do to their logits is tested without vLLM
        "Gemma 2": t.Gemma2Config(
            **COMMON, **local, query_pre_attn_scalar=HEAD_DIM, final_logit_softcapping=5.0
        ),
        "Granite": t.GraniteConfig(**COMMON, **scale, logits_scaling=8.0),
        "Cohere": t.CohereConfig(**COMMON, logit_scale=0.25),
        "Cohere 2": t.Cohere2Config(**COMMON, **local, logit_scale=0.25),
        "Phi": t.PhiConfig(**COMMON),
        "MiniCPM3": t.MiniCPM3Config(
            **COMMON,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_nope_head_dim=16,
            qk_rope_head_dim=16,
            v_head_dim=32,
            dim_model_base=32,
        ),
        "HyperCLOVA X": t.HyperCLOVAXConfig(**COMMON, logits_scaling=0.125),
        "GPT-NeoX": t.GPTNeoXConfig(**COMMON),
        "Qwen3-Next": t.Qwen3NextConfig(
            **COMMON,
            **mixture,
            layer_types=["linear_attention", "full_attention"] * 2,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
        ),
        "Qwen3.5-MoE": t.Qwen3_5MoeTextConfig(
            **without_width,
            **mixture,
            shared_expert_intermediate_size=HIDDEN,
            layer_types=["linear_attention", "full_attention"] * 2,
            linear_num_value_heads=4,
            linear_num_key_heads=2,
            linear_key_head_dim=16,
            linear_value_head_dim=16,
            rope_parameters={**rope(), "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]},
        ),
        "Granite hybrid": t.GraniteMoeHybridConfig(
            **COMMON,
            **scale,
            logits_scaling=8.0,
            num_local_experts=4,
            num_experts_per_tok=2,
            shared_intermediate_size=HIDDEN,
            layer_types=["mamba", "attention"] * 2,
            mamba_n_heads=8,
            mamba_d_head=32,
            mamba_d_state=16,
            mamba_n_groups=1,
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
        bias = model.get_output_embeddings().bias
        if bias is not None:  # zeros would show nothing
            torch.nn.init.normal_(bias)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def multimodal() -> dict[str, PreTrainedConfig]:
    """Configurations of models that see images too; each stores its language model elsewhere."""
    import transformers as t

    local = {"sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"] * 2}
    sections = {**COMMON, "rope_parameters": {**rope(), "mrope_section": [4, 6, 6]}}
    tower = {"hidden_size": 32, "depth": 1, "intermediate_size": 64, "num_heads": 2}
    ids = {"image_token_id": 3, "video_token_id": 4, "vision_start_token_id": 5}
    return {
        "Gemma 3": t.Gemma3Config(
            text_config={
                **COMMON,
                **local,
            },
            vision_config=VISION,
            mm_tokens_per_image=4,
            image_token_index=3,
            boi_token_index=4,
            eoi_token_index=5,
        ),
        "LLaVA": t.LlavaConfig(
            text_config={**COMMON, "model_type": "llama"},
            vision_config={**VISION, "model_type": "clip_vision_model"},
            image_token_index=3,
        ),
        "Qwen2.5-VL": t.Qwen2_5_VLConfig(
            text_config=sections,
            vision_config={**tower, "out_hidden_size": HIDDEN, "fullatt_block_indexes": [0]},
            vision_end_token_id=6,
            **ids,
        ),
        "Qwen3-VL": t.Qwen3VLConfig(
            text_config=sections,
            vision_config={**tower, "out_hidden_size": HIDDEN, "deepstack_visual_indexes": [0]},
            vision_end_token_id=6,
            **ids,
        ),
    }


def write_multimodal(folder: Path, name: str, seed: int = 0) -> Path:
    """A random float32 model of `multimodal()`, with tokenizer and template."""
    import torch
    from transformers import AutoModelForImageTextToText

    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(multimodal()[name])
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder
