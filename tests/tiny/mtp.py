"""Tiny targets that bring a layer which predicts one token more, with random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny.architectures import COMMON, architectures
from tests.tiny.models import HIDDEN, rope, write_tokenizer

LAYERS = 2
NAMES = {  # of the parts that the layer has beside a decoder layer: behind the last, Qwen's
    "enorm": ("enorm", "pre_fc_norm_embedding"),
    "hnorm": ("hnorm", "pre_fc_norm_hidden"),
    "eh_proj": ("eh_proj", "fc"),
    "norm": ("shared_head.norm", "norm"),
}
# What published configs say, and transformers leaves out.
PUBLISHED = {"DeepSeek-V3": {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}}
KINDS = ("GLM-4.5", "DeepSeek-V3", "Qwen3-Next", "Qwen3.5", "Qwen3.5-MoE")


def config_of(kind: str) -> Any:
    """transformers' config of the architecture, of two layers."""
    import transformers as t

    mixture = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": HIDDEN}
    common = {**COMMON, "num_hidden_layers": LAYERS, "tie_word_embeddings": False}
    if kind == "GLM-4.5":
        return t.Glm4MoeConfig(
            **common, **mixture, first_k_dense_replace=1, use_qk_norm=True, rope_parameters=rope()
        )
    if kind == "DeepSeek-V3":
        common |= {"num_key_value_heads": common["num_attention_heads"]}
        common.pop("head_dim")
        return t.DeepseekV3Config(
            **common,
            **mixture,
            first_k_dense_replace=1,
            n_group=2,
            topk_group=1,
            q_lora_rank=32,
            kv_lora_rank=32,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=32,
            rope_parameters=rope(),
        )
    if kind == "Qwen3.5":
        linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2}
        linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
        turned = {**rope(), "partial_rotary_factor": 0.5, "mrope_section": [2, 3, 3]}
        config: Any = t.Qwen3_5TextConfig(
            **common,
            **linear,
            layer_types=["full_attention"] * LAYERS,
            rope_parameters=turned,
        )
        return config
    config = architectures()[kind]
    config.num_hidden_layers, config.tie_word_embeddings = LAYERS, False
    config.layer_types = ["full_attention"] * LAYERS  # vLLM has no float32 for the others on CPU
    return config


def write_mtp_target(folder: Path, kind: str) -> Path:
    """A random float32 target whose last layer stands once more behind it, changed a little."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    config, behind = config_of(kind), not kind.startswith("Qwen")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tensors = load_file(folder / "model.safetensors")
        last = f"layers.{LAYERS - 1}."
        prefix = f"model.layers.{LAYERS}." if behind else "mtp."
        own: dict[str, torch.Tensor] = {}
        for name, tensor in tensors.items():
            if last in name:
                new = prefix + ("" if behind else "layers.0.") + name.split(last)[1]
                own[new] = tensor + 0.02 * torch.randn_like(tensor)
        for name in NAMES:
            stored = f"{prefix}{NAMES[name][not behind]}.weight"
            zero_centred = kind.startswith("Qwen")
            if name == "eh_proj":
                own[stored] = torch.randn(HIDDEN, 2 * HIDDEN) * 0.1
            else:
                own[stored] = 0.2 * torch.randn(HIDDEN) + (0.0 if zero_centred else 1.0)
    save_file(tensors | own, folder / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((folder / "config.json").read_text())
    raw |= PUBLISHED.get(kind, {})
    raw["num_nextn_predict_layers" if behind else "mtp_num_hidden_layers"] = 1
    (folder / "config.json").write_text(json.dumps(raw))
    write_tokenizer(folder)
    return folder
