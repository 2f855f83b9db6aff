"""A tiny target that brings a layer which predicts one token more, as GLM-4.5 does."""

from __future__ import annotations

import json
from pathlib import Path

from tests.tiny.architectures import COMMON
from tests.tiny.models import HIDDEN, rope, write_tokenizer

LAYERS = 2


def write_own_head(folder: Path) -> Path:
    """A random float32 GLM-4-MoE of two layers, and a third that drafts.

    No layer adds anything to the residual stream, so that the next token depends on the last one
    alone; the drafting layer hands the embedding on, and so foretells what the target will write.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import Glm4MoeConfig, Glm4MoeForCausalLM

    settings = {
        **COMMON,
        "num_hidden_layers": LAYERS,
        "moe_intermediate_size": HIDDEN,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "first_k_dense_replace": 1,  # the last layer has experts, and so has the one after it
        "tie_word_embeddings": False,
    }
    config = Glm4MoeConfig(**settings, rope_parameters=rope())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        Glm4MoeForCausalLM(config).save_pretrained(folder)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor.zero_()
    last, drafting = f"model.layers.{LAYERS - 1}.", f"model.layers.{LAYERS}."
    own = {
        name.replace(last, drafting): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith(last)
    }
    own |= {drafting + name: torch.ones(HIDDEN) for name in NORMS}
    own[drafting + "eh_proj.weight"] = torch.eye(HIDDEN, 2 * HIDDEN)  # embedding, hidden state
    own[drafting + "embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    own[drafting + "shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors | own, path, metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | {"num_nextn_predict_layers": 1}))
    write_tokenizer(folder)
    return folder


NORMS = ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")


def next_tokens(folder: Path) -> list[int]:
    """What such a target writes after each token."""
    from safetensors.torch import load_file

    tensors = load_file(folder / "model.safetensors")
    embedded = tensors["model.embed_tokens.weight"].double()
    normed = embedded / embedded.square().mean(-1, keepdim=True).add(1e-5).sqrt()
    found: list[int] = (normed @ tensors["lm_head.weight"].double().T).argmax(-1).tolist()
    return found
