"""Seeded random models, small enough that real vLLM loads them in seconds."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, POSITIONS = 512, 128, 4, 4, 2, 32, 1024
LAYER_IDS = (1, 2, 3)
DRAFT_VOCAB = 320

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}\n"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def rope() -> dict[str, object]:
    """A dict of its own each time: transformers' Phi3Config writes into what it is given."""
    return {"rope_type": "default", "rope_theta": 10000.0}


def write_tokenizer(folder: Path, vocab: int = VOCAB) -> None:
    """A byte-level BPE of exactly `vocab` entries, learned from a standard library module."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train([argparse.__file__], trainer)
    assert bpe.get_vocab_size() == vocab
    PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


def write_target(
    folder: Path,
    *,
    seed: int = 0,
    hidden: int = HIDDEN,
    layers: int = LAYERS,
    vocab: int = VOCAB,
) -> Path:
    """A random bf16 Llama; weights wide enough that near-ties in its logits are rare."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=POSITIONS,
        rope_parameters=rope(),
        initializer_range=0.2,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    write_tokenizer(folder, vocab)
    return folder


def draft_config(**changes: object) -> dict[str, object]:
    """The config.json of an EAGLE-3 draft in the EAGLE format for the tiny target."""
    config: dict[str, object] = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "vocab_size": VOCAB,
        "draft_vocab_size": DRAFT_VOCAB,
        "max_position_embeddings": POSITIONS,
        "rope_parameters": rope(),
        "rope_theta": rope()["rope_theta"],
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eagle_aux_hidden_state_layer_ids": list(LAYER_IDS),
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return {**config, **changes}


def draft_tensors(seed: int = 1, vocab_size: int = VOCAB) -> dict[str, torch.Tensor]:
    """Random weights by the names of the EAGLE format, with a reduced vocabulary (d2t, t2d)."""
    import torch

    generator = torch.Generator().manual_seed(seed)

    def linear(rows: int, columns: int) -> torch.Tensor:
        weight = torch.randn(rows, columns, generator=generator) / columns**0.5
        return weight.to(torch.bfloat16)

    norm = torch.ones(HIDDEN, dtype=torch.bfloat16)
    kept = torch.randperm(VOCAB, generator=generator)[:DRAFT_VOCAB].sort().values
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[kept] = True
    return {
        "fc.weight": linear(HIDDEN, len(LAYER_IDS) * HIDDEN),
        "midlayer.hidden_norm.weight": norm.clone(),
        "midlayer.input_layernorm.weight": norm.clone(),
        "midlayer.post_attention_layernorm.weight": norm.clone(),
        "midlayer.self_attn.q_proj.weight": linear(HEADS * HEAD_DIM, 2 * HIDDEN),
        "midlayer.self_attn.k_proj.weight": linear(KV_HEADS * HEAD_DIM, 2 * HIDDEN),
        "midlayer.self_attn.v_proj.weight": linear(KV_HEADS * HEAD_DIM, 2 * HIDDEN),
        "midlayer.self_attn.o_proj.weight": linear(HIDDEN, HEADS * HEAD_DIM),
        "midlayer.mlp.gate_proj.weight": linear(2 * HIDDEN, HIDDEN),
        "midlayer.mlp.up_proj.weight": linear(2 * HIDDEN, HIDDEN),
        "midlayer.mlp.down_proj.weight": linear(HIDDEN, 2 * HIDDEN),
        "norm.weight": norm.clone(),
        "lm_head.weight": linear(DRAFT_VOCAB, HIDDEN),
        "d2t": kept - torch.arange(DRAFT_VOCAB),
        "t2d": t2d,
    }


def write_draft(folder: Path, *, seed: int = 1, **changes: object) -> Path:
    """A random EAGLE-3 draft; `changes` replace entries of its config.json."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    config = draft_config(**changes)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = draft_tensors(seed, config["vocab_size"])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder
