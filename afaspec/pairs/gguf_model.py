"""A Llama model in a GGUF file, written as the folder that transformers and vLLM load.

What is written depends on the file alone, not on the versions of the libraries here, so that the
model has one hash everywhere. Tensor names, the order of rows in q and k, and the tokenizer's
metadata are those of llama.cpp's converter (convert_hf_to_gguf.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.files import write_json

if TYPE_CHECKING:
    from gguf import GGUFReader
    from tokenizers import Tokenizer
    from torch import Tensor

WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL = 3  # llama.cpp's type of a token that stands for itself in a text, like <|im_end|>


def write_model(file: Path, folder: Path) -> None:
    """Write the model in `file` to `folder`: bf16 weights, config, tokenizer, chat template.

    The weights are dequantised in float32 and rounded to bf16 once; from there on the folder is
    the model.
    """
    from gguf import GGUFReader
    from safetensors.torch import save_file

    reader = GGUFReader(file)
    config = model_config(reader)
    save_file(weights(reader, config), folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", ids)
    tokenizer(reader).save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", tokenizer_config(reader, config))
    template = folder / "chat_template.jinja"
    template.write_text(field(reader, "tokenizer.chat_template"), encoding="utf-8")


def field(reader: GGUFReader, name: str) -> Any:
    """A value of the file's metadata."""
    return reader.fields[name].contents()


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """The config.json of this Llama model."""

    def number(name: str) -> float:
        """As it was before the file kept it in float32: 1e-05, not 9.999999747378752e-06."""
        return float(f"{field(reader, name):.6g}")

    rope = {"rope_theta": number("llama.rope.freq_base"), "rope_type": "default"}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": field(reader, "tokenizer.ggml.bos_token_id"),
        "dtype": "bfloat16",
        "eos_token_id": field(reader, "tokenizer.ggml.eos_token_id"),
        "head_dim": field(reader, "llama.rope.dimension_count"),
        "hidden_act": "silu",
        "hidden_size": field(reader, "llama.embedding_length"),
        "intermediate_size": field(reader, "llama.feed_forward_length"),
        "max_position_embeddings": field(reader, "llama.context_length"),
        "mlp_bias": False,
        "num_attention_heads": field(reader, "llama.attention.head_count"),
        "num_hidden_layers": field(reader, "llama.block_count"),
        "num_key_value_heads": field(reader, "llama.attention.head_count_kv"),
        "pad_token_id": field(reader, "tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": number("llama.attention.layer_norm_rms_epsilon"),
        "rope_parameters": rope,
        "tie_word_embeddings": all(tensor.name != "output.weight" for tensor in reader.tensors),
        "vocab_size": field(reader, "llama.vocab_size"),
    }


def weights(reader: GGUFReader, config: dict[str, Any]) -> dict[str, Tensor]:
    """All tensors in bf16, under transformers' names."""
    import torch
    from gguf import dequantize

    state = {}
    for tensor in reader.tensors:
        name, kind = plain_name(tensor.name)
        values = torch.tensor(dequantize(tensor.data, tensor.tensor_type))
        if kind == "attn_q":
            values = halves_apart(values, config["num_attention_heads"])
        if kind == "attn_k":
            values = halves_apart(values, config["num_key_value_heads"])
        state[name] = values.to(torch.bfloat16).contiguous()
    return state


def plain_name(name: str) -> tuple[str, str]:
    """transformers' name of a tensor, and which of a layer's it is ("" for none)."""
    if name in WHOLE:
        return WHOLE[name], ""
    _, layer, kind, _ = name.split(".")
    return f"model.layers.{layer}.{IN_LAYER[kind]}.weight", kind


def halves_apart(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * d, in] of q or k as transformers' RoPE wants them, i beside i + d/2.

    llama.cpp turns neighbours, 2i beside 2i + 1, and its converter reorders the rows for it.
    """
    return rows.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def tokenizer(reader: GGUFReader) -> Tokenizer:
    """Byte-level BPE that takes every digit apart, as the file's kind `smollm` says.

    transformers' own reader of GGUF does not know this kind and leaves digits beside their blanks.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = field(reader, "tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field(reader, "tokenizer.ggml.merges")]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    digits = pre_tokenizers.Digits(individual_digits=True)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    kinds = field(reader, "tokenizer.ggml.token_type")
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    made.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return made


def tokenizer_config(reader: GGUFReader, config: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer_config.json: a tokenizer.json taken as it is, with these special tokens."""
    tokens = field(reader, "tokenizer.ggml.tokens")
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": tokens[config["bos_token_id"]],
        "eos_token": tokens[config["eos_token_id"]],
        "pad_token": tokens[config["pad_token_id"]],
        "unk_token": tokens[field(reader, "tokenizer.ggml.unknown_token_id")],
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
