"""Draft checkpoints drawn at random, right and wrong, and what vLLM computes from them.

The forward is written out from the stored tensors and the config, one token after another, and
shares no code with `drafts`. It fails where a stored tensor is left over, so that what it accepts
is accepted whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

VOCAB, WIDTH, LAYERS = 20, 16, 6  # of the target
ROWS, STEPS = 5, 3
ROPES = [
    None,
    {"type": "linear", "factor": 2.0},
    {"rope_type": "default", "rope_theta": 50.0},
    {"rope_type": "dynamic", "factor": 2.0, "partial_rotary_factor": 0.5},
    {"type": "mrope", "mrope_section": [1, 1]},
]
UNUSED = ("t2d", "rotary_emb.inv_freq")  # stored for other programs


@dataclass
class Checkpoint:
    """A draft before it is written; `faults` says what was done to a right one."""

    family: str
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    faults: list[str] = field(default_factory=list)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """How hypothesis shows an example that fails."""
        shapes = {name: (str(t.dtype), list(t.shape)) for name, t in self.tensors.items()}
        printer.text(f"{self.family} {self.faults} {self.config} {shapes}")

    def write(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(
            {n: t.contiguous() for n, t in self.tensors.items()}, folder / "model.safetensors"
        )
        return folder


def write_target(folder: Path) -> Path:
    """A target of which drafts take the embedding and the output layer; it has no layers."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randn(VOCAB, WIDTH, generator=generator)
        for name in ("model.embed_tokens.weight", "lm_head.weight")
    }
    config = {"model_type": "llama", "hidden_size": WIDTH, "vocab_size": VOCAB}
    config |= {"num_attention_heads": 2, "intermediate_size": 8}
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": LAYERS}))
    save_file(tensors, folder / "model.safetensors")
    return folder


# Checkpoints


class Maker:
    """Random tensors, in types of their own."""

    def __init__(self, draw: st.DrawFn):
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        self.dtypes = draw(st.sampled_from([["float32"], ["bfloat16"], ["float32", "bfloat16"]]))
        self.tensors: dict[str, Tensor] = {}

    def add(self, name: str, *shape: int) -> None:
        value = torch.randn(shape, generator=self.generator)
        value = (
            1 + value / 5 if len(shape) == 1 and "bias" not in name else value / shape[-1] ** 0.5
        )
        dtype = self.dtypes[len(self.tensors) % len(self.dtypes)]
        self.tensors[name] = value.to(getattr(torch, dtype))

    def layer(self, name: str, config: dict[str, Any], wide: int, first_norm: bool) -> None:
        size, inner, heads = (
            config[key] for key in ("hidden_size", "intermediate_size", "num_attention_heads")
        )
        head = config.get("head_dim") or size // heads
        keys = (config.get("num_key_value_heads") or heads) * head
        for part, rows, columns in (
            ("q", heads * head, wide),
            ("k", keys, wide),
            ("v", keys, wide),
            ("o", size, heads * head),
        ):
            self.add(f"{name}.self_attn.{part}_proj.weight", rows, columns)
            if has_bias(config, part):
                self.add(f"{name}.self_attn.{part}_proj.bias", rows)
        if is_qwen3(config):
            for part in "qk":
                self.add(f"{name}.self_attn.{part}_norm.weight", head)
        for part, rows, columns in (
            ("gate", inner, size),
            ("up", inner, size),
            ("down", size, inner),
        ):
            self.add(f"{name}.mlp.{part}_proj.weight", rows, columns)
            if has_bias(config, part):
                self.add(f"{name}.mlp.{part}_proj.bias", rows)
        self.add(f"{name}.post_attention_layernorm.weight", size)
        if first_norm:
            self.add(f"{name}.input_layernorm.weight", size)


def layer_config(draw: st.DrawFn) -> dict[str, Any]:
    """The fields of a Llama-like config, some of them left out."""
    config: dict[str, Any] = {
        "model_type": "llama",
        "hidden_size": WIDTH,
        "intermediate_size": draw(st.sampled_from([8, 24])),
        "num_attention_heads": draw(st.sampled_from([2, 4])),
        "num_hidden_layers": draw(st.sampled_from([1, 1, 2])),
        "vocab_size": VOCAB,
        "max_position_embeddings": 64,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "rope_theta": draw(st.sampled_from([10000.0, 100.0])),
        "hidden_act": "silu",
    }
    optional: dict[str, Any] = {
        "num_key_value_heads": draw(st.sampled_from([1, 2, None])),
        "head_dim": draw(st.sampled_from([4, 8, None])),
        "attention_bias": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "qkv_bias": draw(st.booleans()),
        "mlp_bias": draw(st.booleans()),
        "partial_rotary_factor": draw(st.sampled_from([0.5, None])),
        "rope_scaling": draw(st.sampled_from(ROPES)),
        "rope_parameters": draw(st.sampled_from(ROPES)),
        "logit_scale": draw(st.sampled_from([1.0, 0.5])),
    }
    for key, value in optional.items():
        if value is not None and draw(st.booleans()):
            config[key] = value
    return config


@st.composite
def eagle3_checkpoints(draw: st.DrawFn) -> Checkpoint:
    config, own_width = layer_config(draw), draw(st.booleans())
    qwen3, reduced = draw(st.booleans()), draw(st.booleans())
    config["architectures"] = ["Eagle3Qwen3ForCausalLM" if qwen3 else "LlamaForCausalLMEagle3"]
    if qwen3:
        config["model_type"] = "qwen3"
        config.setdefault("head_dim", 8)
        config.setdefault("num_key_value_heads", 2)
    if draw(st.booleans()):
        kinds = st.sampled_from(["sliding_attention", "full_attention"])
        layers = config["num_hidden_layers"]
        config["layer_types"] = draw(st.lists(kinds, min_size=layers, max_size=layers))
        config["sliding_window"] = draw(st.integers(1, ROWS))
        config["use_sliding_window"] = draw(st.booleans())
    ids = draw(st.sampled_from([[1, 2, 4], [0, 3, 6]]))
    config |= {
        "eagle_aux_hidden_state_layer_ids": ids,
        "draft_vocab_size": 12 if reduced else VOCAB,
    }
    if not draw(st.booleans()):
        config["hidden_size"] = WIDTH if own_width else 8
        config.setdefault("head_dim", 4)  # else of half of 2 channels, which none can turn
        config["target_hidden_size"] = WIDTH
    for name in ("norm_before_residual", "norm_before_fc", "fc_norm", "norm_output"):
        if draw(st.booleans()):
            config[name] = draw(st.booleans())
    size, width = config["hidden_size"], config.get("target_hidden_size", config["hidden_size"])
    make = Maker(draw)
    make.add("fc.weight", size, 3 * width)
    for i in range(config["num_hidden_layers"]):
        first = (
            "midlayer" if config["num_hidden_layers"] == 1 and draw(st.booleans()) else "layers.0"
        )
        name = first if i == 0 else f"layers.{i}"
        make.layer(name, config, 2 * size if i == 0 else size, first_norm=True)
        if i == 0:
            make.add(f"{name}.hidden_norm.weight", size)
    make.add("norm.weight", size)
    if config.get("norm_before_fc"):
        make.add("input_norm.weight", 3 * width)
    for i in range(3 * bool(config.get("fc_norm"))):
        make.add(f"fc_norm.{i}.weight", width)
    if size != WIDTH or draw(st.booleans()):
        make.add("embed_tokens.weight", VOCAB, size)
    if reduced or size != WIDTH or draw(st.booleans()):
        make.add("lm_head.weight", config["draft_vocab_size"], size)
    if reduced:
        kept = torch.randperm(VOCAB, generator=make.generator)[:12].sort().values
        make.tensors["d2t"] = kept - torch.arange(12)
        if draw(st.booleans()):
            make.tensors["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, kept, True)
    return damaged(draw, Checkpoint("eagle3", config, make.tensors))


@st.composite
def eagle_checkpoints(draw: st.DrawFn) -> Checkpoint:
    config = layer_config(draw) | {"architectures": ["LlamaForCausalLM"]}
    make = Maker(draw)
    make.add("fc.weight", WIDTH, 2 * WIDTH)
    for i in range(config["num_hidden_layers"]):
        make.layer(f"layers.{i}", config, WIDTH, first_norm=i > 0)
    if draw(st.booleans()):
        make.add("embed_tokens.weight", VOCAB, WIDTH)
    return damaged(draw, Checkpoint("eagle", config, make.tensors))


@st.composite
def medusa_checkpoints(draw: st.DrawFn) -> Checkpoint:
    layers, bias = draw(st.integers(1, 2)), draw(st.booleans())
    head = draw(st.sampled_from(["own", "shared", "alone"]))
    config = {"hidden_size": WIDTH, "vocab_size": VOCAB, "num_hidden_layers": layers}
    config |= {"architectures": ["MedusaModel"], "model_type": "medusa", "num_heads": STEPS}
    config |= {"medusa_fc_bias": bias, "original_lm_head": head == "shared"}
    make = Maker(draw)
    for i in range(STEPS):
        for j in range(layers):
            make.add(f"blocks.{i}.layers.{j}.weight", WIDTH, WIDTH)
            if bias:
                make.add(f"blocks.{i}.layers.{j}.bias", WIDTH)
        if head == "own":
            make.add(f"lm_heads.{i}.weight", VOCAB, WIDTH)
    if head == "shared":
        make.add("lm_head.weight", VOCAB, WIDTH)
    return damaged(draw, Checkpoint("medusa", config, make.tensors))


# What goes wrong


def damaged(draw: st.DrawFn, made: Checkpoint) -> Checkpoint:
    """The checkpoint, often as it is, else quantized or with one or two faults."""
    if draw(st.integers(0, 3)) == 0:
        quantize(draw, made)
    for _ in range(draw(st.sampled_from([0, 0, 1, 1, 2]))):
        name = draw(st.sampled_from(sorted(FAULTS)))
        FAULTS[name](draw, made)
        made.faults.append(name)
    return made


def some_tensor(draw: st.DrawFn, made: Checkpoint) -> str:
    return draw(st.sampled_from(sorted(made.tensors)))


def drop(draw: st.DrawFn, made: Checkpoint) -> None:
    if len(made.tensors) > 1:
        del made.tensors[some_tensor(draw, made)]


def add(draw: st.DrawFn, made: Checkpoint) -> None:
    of = some_tensor(draw, made)
    name, value = draw(
        st.sampled_from(
            [
                (of.replace(".weight", ".bias"), made.tensors[of][..., :1].flatten().clone()),
                (of.replace("layers.0", "layers.1"), made.tensors[of].clone()),
                (of.replace("midlayer", "layers.0"), made.tensors[of].clone()),
                (f"model.{of}", made.tensors[of].clone()),
                ("layers.0.self_attn.rotary_emb.inv_freq", torch.ones(4)),
                ("d2t", torch.zeros(12, dtype=torch.long)),
                ("norm.weight", torch.ones(WIDTH)),
                ("fc.bias", torch.ones(WIDTH)),
            ]
        )
    )
    made.tensors.setdefault(name, value)


def reshape(draw: st.DrawFn, made: Checkpoint) -> None:
    name = some_tensor(draw, made)
    value = made.tensors[name]
    if value.dim() not in (1, 2):
        return
    changed = [value[:-1], value.t(), value.unsqueeze(0), value.repeat(2, *[1] * (value.dim() - 1))]
    made.tensors[name] = draw(st.sampled_from(changed)).clone()


def spoil(draw: st.DrawFn, made: Checkpoint) -> None:
    value = made.tensors[some_tensor(draw, made)]
    if value.dtype in (torch.float32, torch.bfloat16) and value.numel():
        value.view(-1)[-1] = draw(st.sampled_from([float("nan"), float("inf"), -float("inf")]))


def retype(draw: st.DrawFn, made: Checkpoint) -> None:
    name = some_tensor(draw, made)
    dtype = draw(st.sampled_from([torch.int8, torch.float16, torch.float8_e4m3fn, torch.float64]))
    made.tensors[name] = made.tensors[name].to(dtype)


def remap(draw: st.DrawFn, made: Checkpoint) -> None:
    if "d2t" in made.tensors and made.tensors["d2t"].dtype == torch.long:
        changed = made.tensors["d2t"].clone()
        changed.view(-1)[draw(st.integers(0, changed.numel() - 1))] += draw(st.integers(-20, 20))
        made.tensors["d2t"] = changed


def reconfigure(draw: st.DrawFn, made: Checkpoint) -> None:
    changes: list[dict[str, Any]] = [
        {"head_dim": 4},
        {"head_dim": 8},
        {"num_key_value_heads": 1},
        {"num_key_value_heads": 4},
        {"num_hidden_layers": 1},
        {"num_hidden_layers": 2},
        {"attention_bias": True},
        {"attention_bias": False},
        {"draft_vocab_size": 12},
        {"draft_vocab_size": VOCAB},
        {"vocab_size": VOCAB + 1},
        {"hidden_size": 8},
        {"target_hidden_size": 8},
        {"intermediate_size": 16},
        {"norm_before_fc": True},
        {"fc_norm": True},
        {"norm_before_residual": True},
        {"num_aux_hidden_states": 2},
        {"eagle_aux_hidden_state_layer_ids": [1, 2]},
        {"feature_layers": [1, 2, 3]},
        {"medusa_fc_bias": False},
        {"num_heads": STEPS + 1},
        {"hidden_act": "gelu"},
        {"is_causal": False},
        {"logits_scaling": 8.0},
        {"rope_scaling": {"type": "su", "factor": 2.0}},
        {"partial_rotary_factor": 0.3},
        {"layer_types": ["sliding_attention"]},
        {"eagle_config": {"use_aux_hidden_state": False}},
        {"architectures": ["Eagle3Qwen3ForCausalLM"]},
        {"architectures": ["Eagle3Qwen2_5vlForCausalLM"]},
        {"architectures": ["Eagle3DeepseekV2ForCausalLM"]},
        {"architectures": []},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
    ]
    made.config |= draw(st.sampled_from(changes))


FAULTS: dict[str, Callable[[st.DrawFn, Checkpoint], None]] = {
    fault.__name__: fault for fault in (drop, add, reshape, spoil, retype, remap, reconfigure)
}


# Quantization


def quantize(draw: st.DrawFn, made: Checkpoint) -> None:
    """Store some matrices in FP8 with scales, as compressed-tensors or transformers do."""
    strategy = draw(st.sampled_from(["tensor", "channel", "block", "fp8", "fp8 block"]))
    inverse = strategy.startswith("fp8")
    weights = {"num_bits": 8, "type": "float", "strategy": strategy, "symmetric": True}
    if strategy == "block":
        weights["block_structure"] = [4, 8]
    made.config["quantization_config"] = (
        {"quant_method": "fp8", "weight_block_size": [4, 8] if "block" in strategy else None}
        if inverse
        else {
            "quant_method": "compressed-tensors",
            "format": "float-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        }
    )
    for name, value in list(made.tensors.items()):
        if value.dim() != 2 or ("proj" not in name and name != "fc.weight"):
            continue
        rows, columns = value.shape
        grid = {"channel": (rows, 1), "tensor": (1,), "fp8": (1,)}.get(
            strategy, (-(-rows // 4), -(-columns // 8))
        )
        made.tensors[name] = value.to(torch.float8_e4m3fn)
        made.tensors[name + ("_scale_inv" if inverse else "_scale")] = 0.5 + torch.rand(grid)


def dequantized(tensors: dict[str, Tensor], name: str, take: Callable[[str], None]) -> Tensor:
    """The stored tensor as float32, times the scale of its block."""
    value = tensors[name].float().clone()
    if tensors[name].dtype != torch.float8_e4m3fn:
        return value
    scale_name = next(n for n in (name + "_scale", name + "_scale_inv") if n in tensors)
    take(scale_name)
    scale, (rows, columns) = tensors[scale_name].float(), value.shape
    if scale.numel() == 1:
        return value * scale.view(())
    if scale.shape == (rows, 1):
        return value * scale
    for i in range(rows):
        for j in range(columns):
            value[i, j] *= scale[i // 4, j // 8]
    return value


# What vLLM computes


class Stored:
    """The stored tensors, each of which the forward must take."""

    def __init__(self, made: Checkpoint, target: dict[str, Tensor]):
        self.made, self.target, self.taken = made, target, set[str]()
        self.values: dict[str, Tensor] = {}

    def __call__(self, *names: str) -> Tensor:
        """The first of these that there is, else the target's of the last name."""
        for name in names:
            if name in self.made.tensors and name not in self.values:
                self.taken.add(name)
                self.values[name] = dequantized(self.made.tensors, name, self.taken.add)
            if name in self.values:
                return self.values[name]
        return self.target[names[-1]]

    def maybe(self, name: str, wanted: bool) -> Tensor | None:
        return self(name) if wanted else None

    def left(self) -> set[str]:
        """What the forward did not take, but for what vLLM does not take either."""
        tensors = self.made.tensors.keys() - self.taken
        return {name for name in tensors if not name.endswith(UNUSED)}


def is_qwen3(config: dict[str, Any]) -> bool:
    return "Qwen3ForCausalLM" in "".join(config["architectures"])


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def has_bias(config: dict[str, Any], part: str) -> bool:
    """Does vLLM give the linear layer `part` a bias? Each of its modules reads other fields."""
    attention, either = bool(config.get("attention_bias")), bool(config.get("bias"))
    if is_qwen3(config):
        return attention and part in "qkv"
    if part in ("gate", "up", "down"):
        return bool(config.get("mlp_bias"))
    if part == "o":
        return attention or either
    if config["architectures"] == ["LlamaForCausalLM"]:
        return bool(config.get("qkv_bias", attention or either))
    return attention


def rotated(x: Tensor, position: int, config: dict[str, Any]) -> Tensor:
    """The first d channels of x [heads, head_dim], each pair (i, i + d/2) turned by the position's
    share of theta^(2i/d)."""
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    theta = rope.get("rope_theta", config["rope_theta"])
    share = rope.get("partial_rotary_factor", config.get("partial_rotary_factor") or 1.0)
    if "linear" in (rope.get("type"), rope.get("rope_type")):
        position = position / rope["factor"]
    size = int(x.shape[-1] * share)
    angle = position * theta ** (-torch.arange(size // 2).float() * 2 / size)
    a, b, kept = x[:, : size // 2], x[:, size // 2 : size], x[:, size:]
    turned = [a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()]
    return torch.cat([*turned, kept], -1)


def seen(cache: list[Any], name: str, config: dict[str, Any]) -> list[Any]:
    """The entries of a layer's cache that its last one attends to; they are in order."""
    number = int(name.split(".")[1]) if name.startswith("layers.") else 0
    kinds = config.get("layer_types") or ["full_attention"] * (number + 1)
    gated = config["model_type"] == "qwen3" and not config.get("use_sliding_window")
    sliding = kinds[number] == "sliding_attention" and not gated
    return cache[-config["sliding_window"] :] if sliding else cache


def attend(
    x: Tensor, at: int, cache: list[tuple[Tensor, Tensor]], w: Stored, name: str, c: dict[str, Any]
) -> Tensor:
    """Attention's output for one row x [input], whose key and value go to the cache."""
    heads = c["num_attention_heads"]
    head = c.get("head_dim") or c["hidden_size"] // heads
    kv, eps = c.get("num_key_value_heads") or heads, c["rms_norm_eps"]
    q, k, v = (linear(x, w, name, n) for n in "qkv")
    q, k, v = q.view(heads, head), k.view(kv, head), v.view(kv, head)
    if is_qwen3(c):
        q, k = norm(q, w(f"{name}.q_norm.weight"), eps), norm(k, w(f"{name}.k_norm.weight"), eps)
    cache.append((rotated(k, at, c), v))
    q, mixed, entries = rotated(q, at, c), [], seen(cache, name, c)
    for i in range(heads):
        group = i // (heads // kv)
        keys = torch.stack([key[group] for key, _ in entries])
        values = torch.stack([value[group] for _, value in entries])
        mixed.append((keys @ q[i] / head**0.5).softmax(0) @ values)
    return linear(torch.cat(mixed), w, name, "o")


def linear(x: Tensor, w: Stored, name: str, part: str) -> Tensor:
    """EAGLE's own drafts have no bias of o, whatever their config says."""
    bias, config = f"{name}.{part}_proj.bias", w.made.config
    eagle = config["architectures"] == ["LlamaForCausalLM"]
    wanted = has_bias(config, part) and not (part == "o" and eagle and bias not in w.made.tensors)
    return F.linear(x, w(f"{name}.{part}_proj.weight"), w.maybe(bias, wanted))


def mlp(x: Tensor, w: Stored, name: str) -> Tensor:
    gate, up = linear(x, w, name, "gate"), linear(x, w, name, "up")
    return linear(F.silu(gate) * up, w, name, "down")


def decoder_layer(
    normed: Tensor, residual: Tensor, at: int, cache: Any, w: Stored, name: str, c: dict[str, Any]
) -> Tensor:
    residual = residual + attend(normed, at, cache, w, f"{name}.self_attn", c)
    after = norm(residual, w(f"{name}.post_attention_layernorm.weight"), c["rms_norm_eps"])
    return residual + mlp(after, w, f"{name}.mlp")


def chain(
    step: Callable[[Tensor, int, int, Any], tuple[Tensor, Tensor]],
    start: Callable[[Tensor], Tensor],
    layers: int,
    features: Tensor,
    ids: list[int],
) -> dict[tuple[int, int], Tensor]:
    """Logits by (step, row): a server that knows rows 0..t drafts one token after another."""
    found = {}
    for t in range(len(ids) - 1):
        caches: list[list[Any]] = [[] for _ in range(layers)]
        for row in range(t + 1):
            logits, state = step(start(features[row]), ids[row + 1], row, caches)
        found[0, t] = logits
        for j in range(1, min(STEPS, len(ids) - 1 - t)):
            found[j, t], state = step(state, ids[t + j + 1], t + j, caches)
    return found


def eagle3_logits(w: Stored, features: Tensor, ids: list[int]) -> dict[tuple[int, int], Tensor]:
    c = w.made.config
    eps, layers = c["rms_norm_eps"], c["num_hidden_layers"]
    first = "midlayer" if any(n.startswith("midlayer.") for n in w.made.tensors) else "layers.0"
    if "d2t" in w.made.tensors:
        w.taken.add("d2t")

    def start(f: Tensor) -> Tensor:
        if c.get("norm_before_fc"):
            f = norm(f, w("input_norm.weight"), eps)
        if c.get("fc_norm"):
            parts = f.chunk(3)
            f = torch.cat([norm(p, w(f"fc_norm.{i}.weight"), eps) for i, p in enumerate(parts)])
        return F.linear(f, w("fc.weight"))

    def step(hidden: Tensor, token: int, at: int, caches: Any) -> tuple[Tensor, Tensor]:
        embed = w("embed_tokens.weight")[token]
        normed = norm(hidden, w(f"{first}.hidden_norm.weight"), eps)
        residual = normed if c.get("norm_before_residual") else hidden
        embed = norm(embed, w(f"{first}.input_layernorm.weight"), eps)
        out = decoder_layer(torch.cat([embed, normed]), residual, at, caches[0], w, first, c)
        for i in range(1, layers):
            normed = norm(out, w(f"layers.{i}.input_layernorm.weight"), eps)
            out = decoder_layer(normed, out, at, caches[i], w, f"layers.{i}", c)
        last = norm(out, w("norm.weight"), eps)
        logits = F.linear(last, w("lm_head.weight")) * c.get("logit_scale", 1.0)
        return logits, last if c.get("norm_output") else out

    return chain(step, start, layers, features, ids)


def eagle_logits(w: Stored, features: Tensor, ids: list[int]) -> dict[tuple[int, int], Tensor]:
    c = w.made.config

    def step(hidden: Tensor, token: int, at: int, caches: Any) -> tuple[Tensor, Tensor]:
        out = F.linear(torch.cat([w("embed_tokens.weight")[token], hidden]), w("fc.weight"))
        for i, cache in enumerate(caches):
            name = f"layers.{i}.input_layernorm.weight"
            normed = out if i == 0 else norm(out, w(name), c["rms_norm_eps"])
            out = decoder_layer(normed, out, at, cache, w, f"layers.{i}", c)
        return F.linear(out, w.target["lm_head.weight"]) * c.get("logit_scale", 1.0), out

    return chain(step, lambda f: f, c["num_hidden_layers"], features, ids)


def medusa_logits(w: Stored, features: Tensor, ids: list[int]) -> dict[tuple[int, int], Tensor]:
    c, found = w.made.config, {}
    for t in range(len(ids) - 1):
        for i in range(STEPS):
            x = features[t]
            for j in range(c["num_hidden_layers"]):
                name = f"blocks.{i}.layers.{j}"
                bias = w.maybe(f"{name}.bias", f"{name}.bias" in w.made.tensors)
                x = x + F.silu(F.linear(x, w(f"{name}.weight"), bias))
            found[i, t] = F.linear(x, w(f"lm_heads.{i}.weight", "lm_head.weight"))
    return found


FORWARD = {"eagle3": eagle3_logits, "eagle": eagle_logits, "medusa": medusa_logits}
CHECKPOINTS = {
    "eagle3": eagle3_checkpoints(),
    "eagle": eagle_checkpoints(),
    "medusa": medusa_checkpoints(),
}
