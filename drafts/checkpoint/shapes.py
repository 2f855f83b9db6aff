"""The tensors that a config makes, by module name and shape, and the stored ones held against them.

Free of torch, so that `inspect` can ask. A test holds each family's shapes against its module.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from drafts.checkpoint.source import FETCH, Source
from drafts.errors import UserError
from drafts.tensors import FLOATS, Header

Shapes = dict[str, tuple[int, ...]]
# What vLLM drops too: caches that old versions of transformers stored.
CACHES = (
    "rotary_emb.inv_freq",
    "rotary_emb.cos_cached",
    "rotary_emb.sin_cached",
    "rotary_pos_emb.inv_freq",
)
INTEGERS = ("I64", "I32", "I16", "I8", "U8")
SIZES = (
    "correct the sizes in config.json (heads, head_dim, hidden_size and their like), or download "
    "the draft again"
)


def linear_shapes(name: str, rows: int, columns: int, bias: bool) -> Shapes:
    """A linear layer's weight, and its bias where it has one."""
    shapes: Shapes = {f"{name}.weight": (rows, columns)}
    return shapes | {f"{name}.bias": (rows,)} if bias else shapes


def layer_shapes(
    fields: dict[str, Any], *, input_size: int | None = None, input_norm: bool = True
) -> Shapes:
    """A `drafts.nn.layers.DecoderLayer`, from the arguments of its `LayerConfig`."""
    size, inner, head = fields["hidden_size"], fields["intermediate_size"], fields["head_dim"]
    queries, keys = fields["num_attention_heads"] * head, fields["num_key_value_heads"] * head
    wide, bias = input_size or size, fields["attention_bias"]
    shapes = {
        **linear_shapes("self_attn.q_proj", queries, wide, bias),
        **linear_shapes("self_attn.k_proj", keys, wide, bias),
        **linear_shapes("self_attn.v_proj", keys, wide, bias),
        **linear_shapes("self_attn.o_proj", size, queries, bias),
        **linear_shapes("mlp.gate_proj", inner, size, False),
        **linear_shapes("mlp.up_proj", inner, size, False),
        **linear_shapes("mlp.down_proj", size, inner, False),
        "post_attention_layernorm.weight": (size,),
    }
    if fields.get("qk_norm"):
        shapes |= {f"self_attn.{name}_norm.weight": (head,) for name in "qk"}
    return shapes | {"input_layernorm.weight": (size,)} if input_norm else shapes


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}


def check_whole(
    source: Source,
    rename: Callable[[str], str],
    shapes: Shapes,
    *,
    shared: Collection[str] = (),
    ignored: Callable[[str], Any] = lambda name: False,
    leaves_out: bool = False,
) -> dict[str, Header]:
    """The headers of the stored weights and of d2t, by module name.

    Raises `UserError` unless each stored tensor has a place and its shape, and each place a tensor
    but for those that may be `shared` with the target. `ignored` are further names that vLLM loads
    without computing with them; whether it leaves other names out or refuses them is for the error.
    """
    headers: dict[str, Header] = {}
    for stored, header in source.headers.items():
        name = rename(stored)
        if name.endswith(CACHES) or ignored(name):
            continue
        if name in headers:
            raise UserError(
                f"stores {name} twice, once as {stored}",
                where=source.folder,
                hint="remove the one that is not the draft's",
            )
        headers[name] = header
    mapped = "embed_tokens.weight" in shapes  # what has no embedding has no vocabulary map either
    maps: dict[str, Header] = {}
    for name in ("d2t", "t2d"):
        if mapped and name in headers:
            maps[name] = headers.pop(name)
    for name, header in headers.items():
        check_tensor(source, name, header, shapes, leaves_out)
    if lacking := [name for name in shapes if name not in headers and name not in shared]:
        raise UserError(
            f"lacks the tensor {lacking[0]}, which this config makes"
            + (f" (and {len(lacking) - 1} more)" if lacking[1:] else ""),
            where=source.folder,
            hint=FETCH,
        )
    return headers | check_maps(source, maps, shapes) if mapped else headers


def check_tensor(
    source: Source, name: str, header: Header, shapes: Shapes, leaves_out: bool
) -> None:
    if name not in shapes:
        does = "leaves it out" if leaves_out or name.endswith(".bias") else "refuses it"
        raise UserError(
            f"has the tensor {name}, for which this config has no place: vLLM {does}",
            where=source.folder,
            hint="correct config.json, if a field is missing that asks for it (num_hidden_layers, "
            "attention_bias, medusa_fc_bias ...), or use a draft without",
        )
    if header.shape != shapes[name]:
        raise UserError(
            f"{name} is {list(header.shape)}, the config says {list(shapes[name])}",
            where=source.folder,
            hint=SIZES,
        )
    if header.dtype not in FLOATS:
        raise UserError(
            f"{name} has dtype {header.dtype}, expected one of {', '.join(FLOATS)}",
            where=source.folder,
            hint=f"save the draft as one of {', '.join(FLOATS)}",
        )


def check_maps(source: Source, maps: dict[str, Header], shapes: Shapes) -> dict[str, Header]:
    """The header of d2t, where the vocabulary is reduced. t2d is stored for other programs."""
    d2t, t2d = maps.get("d2t"), maps.get("t2d")
    tokens = shapes["embed_tokens.weight"][0]
    drafted = shapes.get("lm_head.weight", (tokens,))[0]
    wrong = None
    if drafted != tokens and d2t is None:
        raise UserError(
            "has a reduced vocabulary but no d2t tensor that maps it",
            where=source.folder,
            hint=FETCH,
        )
    if d2t is not None and drafted == tokens:
        wrong = f"has a d2t tensor, but its config makes a full vocabulary of {tokens:,}"
    elif d2t is not None and (d2t.shape != (drafted,) or d2t.dtype not in INTEGERS):
        wrong = f"d2t is {list(d2t.shape)} of {d2t.dtype}, expected {[drafted]} whole numbers"
    elif t2d is not None and t2d.shape != (tokens,):
        wrong = f"t2d is {list(t2d.shape)}, expected {[tokens]}"
    if wrong:
        raise UserError(
            wrong,
            where=source.folder,
            hint="correct vocab_size and draft_vocab_size in config.json, or download the draft "
            "again",
        )
    return {} if d2t is None else {"d2t": d2t}
