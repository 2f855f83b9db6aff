"""Config fields that change the forward: honoured as vLLM honours them, or refused by name."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from drafts.checkpoint.fields import DEFAULTS
from drafts.checkpoint.layer_config import layer_fields, target_window
from drafts.checkpoint.source import Source, flatten
from drafts.errors import UserError
from drafts.nn.layers import LayerConfig, rotary
from drafts.registry import read_draft
from drafts.rope import read_rope
from drafts.target.info import read_target
from tests.opened import load_draft
from tests.tiny.architectures import architectures
from tests.tiny.models import draft_config, write_draft, write_target
from tests.vllm_client import VllmWorker

POSITIONS = [0, 1, 2, 7, 31]  # of a rope's cache
DRAWN = 150
QWEN3 = {"architectures": ["Eagle3Qwen3ForCausalLM"], "model_type": "qwen3"}
SLIDING = {"layer_types": ["sliding_attention"], "sliding_window": 8}

REFUSED: dict[str, dict[str, Any]] = {
    # attention
    "is_causal": {"is_causal": False},
    "attention_chunk_size": {"attention_chunk_size": 64},
    "dual_chunk_attention_config": {"dual_chunk_attention_config": {"chunk_size": 64}},
    "no_rope_layers": {"no_rope_layers": [1]},
    "layer_types": {"layer_types": ["chunked_attention"]},
    "for each of 1 layers": {"layer_types": ["full_attention"] * 2},
    "sliding_window is None": {"layer_types": ["sliding_attention"]},
    "sliding_window is -4": {**SLIDING, "sliding_window": -4},
    "sliding_window is 'all'": {**SLIDING, "sliding_window": "all"},
    "clip_qkv": {"clip_qkv": 8.0},
    "use_qk_norm": {"use_qk_norm": True},
    # what the draft reads
    "eagle_config.use_aux_hidden_state": {"eagle_config": {"use_aux_hidden_state": False}},
    "use_aux_hidden_state": {"use_aux_hidden_state": False},
    "num_aux_hidden_states": {"num_aux_hidden_states": 4},
    # activations and norms
    "hidden_act is gelu": {"hidden_act": "gelu"},
    "hidden_act is swish": {"hidden_act": "swish"},
    "hidden_activation": {"hidden_activation": "gelu_pytorch_tanh"},
    "norm_eps": {"norm_eps": 1e-3, "rms_norm_eps": None},
    "rms_norm_eps": {"rms_norm_eps": "small"},
    # scales and caps
    "attention_multiplier": {"attention_multiplier": 0.1},
    "residual_multiplier": {"residual_multiplier": 0.2},
    "embedding_multiplier": {"embedding_multiplier": 12.0},
    "logits_scaling": {"logits_scaling": 8.0},
    "final_logit_softcapping": {"final_logit_softcapping": 30.0},
    "attn_logit_softcapping": {"attn_logit_softcapping": 50.0},
    "scale_emb": {"scale_emb": 12},
    # ropes
    "'longrope' in rope_scaling": {"rope_scaling": {"rope_type": "longrope"}},
    "'su' in rope_scaling": {"rope_scaling": {"type": "su", "factor": 4.0}},
    "'ntk'": {"rope_scaling": {"rope_type": "ntk", "factor": 4.0}},
    "'mrope'": {"rope_scaling": {"type": "mrope"}},
    "alpha": {"rope_scaling": {"rope_type": "dynamic", "alpha": 4.0}},
    "use_fope": {"rope_scaling": {"rope_type": "default", "use_fope": True}},
    "full_attention": {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
    "rope_type yarn and type linear": {
        "rope_scaling": {"rope_type": "yarn", "type": "linear", "factor": 2.0}
    },
    "factor None": {"rope_scaling": {"rope_type": "yarn"}},
    "low_freq_factor None": {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}},
    "partial_rotary_factor is 0.3": {"partial_rotary_factor": 0.3, "head_dim": 30},
    "partial_rotary_factor is 1.5": {"partial_rotary_factor": 1.5},
    "rotary_dim": {"rotary_dim": 16},
    "rotary_pct": {"rotary_pct": 0.5},
    # sizes
    "num_hidden_layers": {"num_hidden_layers": None},
    "head_dim is '32'": {"head_dim": "32"},
    "num_attention_heads is True": {"num_attention_heads": True},
    "lacks rms_norm_eps": {"model_type": "minimax", "rms_norm_eps": None},
}


def layout(config: dict[str, Any], speculators: bool) -> dict[str, Any]:
    """An EAGLE-3 config.json of EAGLE's layout or speculators'; None leaves a field out."""
    config = {key: value for key, value in config.items() if value is not None}
    if not speculators:
        return config
    inner = {key: value for key, value in config.items() if key != "architectures"}
    outer = {"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3"}
    return {**outer, "speculators_config": {}, "transformer_layer_config": inner}


@pytest.mark.parametrize("speculators", [False, True])
@pytest.mark.parametrize("named", REFUSED)
def test_refused_by_name(named: str, speculators: bool, tmp_path: Path) -> None:
    changes = REFUSED[named]
    if speculators and named in ("use_aux_hidden_state", "num_hidden_layers"):
        pytest.skip("stands outside there, or is asked of both layouts")
    folder = write_draft(tmp_path / "draft")
    config = layout(draft_config(**changes), speculators)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        read_draft(folder)
    assert named in str(error.value)
    assert error.value.hint


@pytest.mark.parametrize(
    "neutral",
    [
        {"logits_scaling": 1.0, "residual_multiplier": 1, "final_logit_softcapping": None},
        {"is_causal": True, "mrope_section": None, "use_qk_norm": False},
        {"eagle_config": {"use_aux_hidden_state": True}, "norm_eps": 1e-5},
        {"attention_dropout": 0.1, "pretraining_tp": 2, "anything_else": [1, 2]},
        {"sliding_window": 8, "use_sliding_window": True},  # of no layer: vLLM reads layer_types
    ],
)
def test_harmless_fields_change_nothing(
    neutral: dict[str, Any], tmp_path: Path, tiny_target: Path
) -> None:
    plain = load_draft(write_draft(tmp_path / "plain"), tiny_target)
    other = load_draft(write_draft(tmp_path / "other", **neutral), tiny_target)
    assert other.config == plain.config


@pytest.mark.parametrize("kind", DEFAULTS)
def test_defaults_are_those_of_the_config_class(kind: str) -> None:
    from transformers import CONFIG_MAPPING

    sizes = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}
    theirs = CONFIG_MAPPING[kind](**sizes)
    raw = {"model_type": kind, "architectures": ["LlamaForCausalLMEagle3"], **sizes}
    ours = flatten(Source(Path(), raw | {"vocab_size": 9, "intermediate_size": 8}, {}, {}))
    for field in DEFAULTS[kind]:
        assert ours[field] == (getattr(theirs, field, None) or 256 // 4), field
    assert ours["rope_parameters"] == theirs.rope_parameters


def drawn_rope(draw: random.Random) -> dict[str, Any]:
    kind = draw.choice(["default", "linear", "dynamic", "llama3", "yarn", "mrope", "su"])
    rope: dict[str, Any] = {draw.choice(["rope_type", "type"]): kind}
    if draw.random() < 0.1:
        rope = {"rope_type": kind, "type": draw.choice([kind, "mrope", "linear"])}
    optional = {
        "factor": draw.choice([2.0, 4.0]),
        "original_max_position_embeddings": draw.choice([16, 64]),
        "rope_theta": draw.choice([10000.0, 500000.0]),
        "partial_rotary_factor": 0.5,
    }
    likely = {"factor": 0.95, "partial_rotary_factor": 0.2}
    rope |= {k: v for k, v in optional.items() if draw.random() < likely.get(k, 0.4)}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind == "mrope":
        rope["mrope_section"] = [8, 4, 4]
    if kind == "yarn":
        yarn = {"attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2, "truncate": False}
        yarn |= {"mscale": 0.7, "mscale_all_dim": 0.9}
        rope |= {k: v for k, v in yarn.items() if draw.random() < 0.3}
    return rope


def drawn_config(seed: int) -> dict[str, Any]:
    """A config of an EAGLE-3 draft of two layers, many of its fields left out, or twice there."""
    draw = random.Random(seed)
    config: dict[str, Any] = {
        "model_type": draw.choice(["llama", "llama", "qwen3", "qwen3", "mistral", "qwen2"]),
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "vocab_size": 512,
    }
    kinds = ["sliding_attention", "full_attention"]
    optional = [
        ("num_key_value_heads", draw.choice([2, 2, 1]), 0.8),
        ("head_dim", draw.choice([32, 64]), 0.8),
        ("max_position_embeddings", 1024, 0.9),
        ("rms_norm_eps", 1e-5, 0.9),
        ("hidden_act", "silu", 0.9),
        ("rope_theta", draw.choice([10000.0, 1000000.0]), 0.5),
        ("rope_scaling", draw.choice([drawn_rope(draw), None]), 0.5),
        ("rope_parameters", drawn_rope(draw), 0.5),
        ("partial_rotary_factor", 0.5, 0.1),
        ("original_max_position_embeddings", 32, 0.1),
        ("layer_types", [draw.choice(kinds), draw.choice(kinds)], 0.3),
        ("sliding_window", 8, 0.6),
        ("use_sliding_window", draw.choice([True, True, False]), 0.5),
        ("max_window_layers", draw.choice([0, 1, 2]), 0.3),
        ("attention_bias", True, 0.3),
    ]
    draw.shuffle(optional)
    config |= {key: value for key, value, likely in optional if draw.random() < likely}
    speculators = draw.random() < 0.4
    if speculators and config["model_type"] not in ("llama", "qwen3"):
        config["model_type"] = "llama"
    qwen3 = config["model_type"] == "qwen3" if speculators else draw.random() < 0.5
    name = "Eagle3Qwen3ForCausalLM" if qwen3 else "LlamaForCausalLMEagle3"
    made = layout({"architectures": [name]}, speculators)
    return {**made, "transformer_layer_config": config} if speculators else made | config


def read_alone(config: dict[str, Any], path: Path) -> tuple[dict[str, Any], torch.Tensor]:
    """Our fields of a config, and the cosines and sines of its rope at `POSITIONS`."""
    flat = flatten(Source(path, config, {}, {}))
    qwen3 = flat["model_type"] == "qwen3" if "speculators_model_type" in config else None
    if qwen3 is None:
        qwen3 = "Eagle3Qwen3ForCausalLM" in config["architectures"]
    c = LayerConfig(**layer_fields(flat, "qwen3" if qwen3 else "llama"))
    names = ("num_layers", "num_key_value_heads", "head_dim", "max_positions", "rms_norm_eps")
    fields = {name: getattr(c, name) for name in (*names, "qkv_bias")}
    fields |= {"hidden_act": "silu", "windows": [c.window(i) for i in range(c.num_layers)]}
    cos, sin = rotary(c)(torch.zeros(1), torch.tensor([POSITIONS]))
    half = cos.shape[-1] // 2
    return fields, torch.cat([cos[0, :, :half], sin[0, :, :half]], dim=-1)


def test_vllm_reads_drawn_configs_alike(tmp_path: Path, vllm_worker: VllmWorker) -> None:
    """What we read is what vLLM reads; what vLLM refuses needs no more of us."""
    folders = []
    for seed in range(DRAWN):
        folders.append(tmp_path / str(seed))
        folders[-1].mkdir()
        (folders[-1] / "config.json").write_text(json.dumps(drawn_config(seed)))
    theirs = vllm_worker.read_configs(folders, POSITIONS)
    equal = 0
    for folder, read in zip(folders, theirs, strict=True):
        config = json.loads((folder / "config.json").read_text())
        try:
            fields, cos_sin = read_alone(config, folder)
        except UserError:
            continue
        if "error" in read:
            continue
        assert fields == read["fields"], json.dumps(config)
        expected = torch.tensor(read["cos_sin"])
        assert cos_sin.shape == expected.shape, json.dumps(config)
        torch.testing.assert_close(cos_sin, expected, rtol=0, atol=2e-6, msg=json.dumps(config))
        equal += 1
    assert equal > DRAWN / 4


@pytest.mark.parametrize(
    ("config", "theta", "kind"),
    [
        ({"rope_theta": 5.0}, 5.0, "default"),
        ({}, 7.0, "default"),
        ({"rope_theta": 5.0, "rope_parameters": {"rope_theta": 6.0}}, 6.0, "default"),
        (
            {
                "rope_theta": 5.0,
                "rope_parameters": {"rope_theta": 6.0},
                "rope_scaling": {"type": "linear", "factor": 2.0},
            },
            5.0,
            "linear",
        ),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, 7.0, "default"),
    ],
)
def test_of_two_ropes_the_older_name_counts(
    config: dict[str, Any], theta: float, kind: str
) -> None:
    rope = read_rope(config | {"max_position_embeddings": 64}, Path(), theta=7.0)
    assert (rope["rope_theta"], rope["rope_type"]) == (theta, kind)


def test_qwen3_needs_its_switch_for_windows(tmp_path: Path, tiny_target: Path) -> None:
    """So transformers reads a Qwen3 config, and vLLM with it."""
    flat = flatten(Source(tmp_path, draft_config(**QWEN3, **SLIDING), {}, {}))
    assert layer_fields(flat, "qwen3")["windows"] == ()
    flat["use_sliding_window"] = True
    assert layer_fields(flat, "qwen3")["windows"] == (8,)
    flat |= {"layer_types": None, "max_window_layers": 0}
    assert layer_fields(flat, "qwen3")["windows"] == (8,)


@pytest.mark.parametrize(
    ("name", "changes", "window"),
    [
        ("Llama", {}, None),
        ("Llama", {"sliding_window": 16}, 16),  # so vLLM has it, whatever transformers does
        ("Mistral", {"sliding_window": 16}, 16),
        ("Mistral", {"sliding_window": None}, None),
        ("Phi-3", {"sliding_window": 16}, 16),
        ("Qwen2", {"sliding_window": 16}, None),
        ("Qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, 16),
        ("Qwen3", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, None),
        ("Gemma 3", {}, None),
    ],
)
def test_a_targets_window_is_its_drafts(
    name: str, changes: dict[str, Any], window: int | None, tmp_path: Path
) -> None:
    """A draft's layers without a window of their own get that of a target that slides whole."""
    from transformers import AutoConfig

    folder = write_target(tmp_path / "target")
    config = json.loads(architectures()[name].to_json_string(use_diff=False)) | changes
    if "max_window_layers" in changes:
        del config["layer_types"]
    (folder / "config.json").write_text(json.dumps(config))
    target, theirs = read_target(folder), AutoConfig.from_pretrained(folder)
    kinds = getattr(theirs, "layer_types", None)
    whole = kinds is None or set(kinds) == {"sliding_attention"}
    assert window == (getattr(theirs, "sliding_window", None) if whole else None)
    assert target_window(target) == window
    draft = load_draft(write_draft(tmp_path / "draft"), folder)
    assert draft.layers[0].self_attn.window == window
