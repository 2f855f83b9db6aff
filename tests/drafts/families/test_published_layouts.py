"""Layouts of EAGLE-3 drafts that people publish: read, adapted, merged, and served by vLLM again.

Real: the fields of each config.json and their values but for sizes, the tensors' names, dtypes and
the ratios of their shapes; that no config names layer ids, so that vLLM's default counts; that the
draft allows fewer positions than its target (first layout), has an embedding of its own (second).

- `eagle`: yuhuili/EAGLE3-LLaMA3.1-Instruct-8B. (Published as a pickle, as far as we know, which
  afaspec does not load: these are its tensors when saved as safetensors.)
- `speculators`: RedHatAI/Llama-3.1-8B-Instruct-speculator.eagle3; the fields are those of the
  config that speculators' own converter published for this target
  (nm-testing/EAGLE3-LLaMA3.1-Instruct-8B-converted).
- `specforge`: a Qwen3-8B draft such as AngelSlim/Qwen3-8B_eagle3; the fields are those of
  SpecForge's config for Qwen3, the sizes Qwen3-8B's.

Scaled: hidden and intermediate size, heads and head_dim (each by a whole factor, so that heads per
key head and heads times head_dim over hidden size stay), vocabularies to 512 and 128 tokens, the
target to 8 layers, whose default ids (2, 4, 5) are distinct. Weights are random. At real sizes the
layouts are only inspected, from files that hold nothing but zeros.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from afaspec.train.config import TrainConfig
from tests.drafts.families.test_vllm_parity import PROMPTS, Reference, accepted, vllm_runs
from tests.opened import convert, inspect_draft, load_draft, merge, train
from tests.tiny.architectures import COMMON
from tests.tiny.models import write_tokenizer
from tests.tiny.store import write_store
from tests.vllm_client import VllmWorker

DEFAULT_IDS = (2, 4, 5)
LLAMA = {"hidden": 4096, "inner": 14336, "heads": 32, "kv": 8, "size": 128, "vocab": 128256}
QWEN3 = {**LLAMA, "inner": 12288, "vocab": 151936}
DRAFT_VOCAB = 32000
SMALLER = {"hidden": 32, "inner": 32, "heads": 8, "kv": 8, "size": 4}
DTYPES = {"eagle": "float16", "speculators": "bfloat16", "specforge": "bfloat16"}
CODES = {"float16": "F16", "bfloat16": "BF16", "int64": "I64", "bool": "BOOL"}


def sizes(layout: str, scaled: bool) -> dict[str, int]:
    real = QWEN3 if layout == "specforge" else LLAMA
    if not scaled:
        return {**real, "draft": DRAFT_VOCAB}
    return {**{k: v // SMALLER.get(k, 1) for k, v in real.items()}, "vocab": 512, "draft": 128}


def config(layout: str, n: dict[str, int]) -> dict[str, Any]:
    if layout == "eagle":
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            "bos_token_id": 128000,
            "eos_token_id": 128001,
            "hidden_act": "silu",
            "hidden_size": n["hidden"],
            "initializer_range": 0.02,
            "intermediate_size": n["inner"],
            "max_position_embeddings": 2048,
            "model_type": "llama",
            "num_attention_heads": n["heads"],
            "num_key_value_heads": n["kv"],
            "num_hidden_layers": 1,
            "pad_token_id": 0,
            "rms_norm_eps": 1e-05,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "transformers_version": "4.28.1",
            "use_cache": True,
            "vocab_size": n["vocab"],
            "draft_vocab_size": n["draft"],
        }
    layer = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "head_dim": n["size"],
        "hidden_act": "silu",
        "hidden_size": n["hidden"],
        "initializer_range": 0.02,
        "intermediate_size": n["inner"],
        "model_type": "llama",
        "num_attention_heads": n["heads"],
        "num_hidden_layers": 1,
        "num_key_value_heads": n["kv"],
        "use_cache": True,
        "vocab_size": n["vocab"],
    }
    if layout == "specforge":
        return {
            "architectures": ["LlamaForCausalLMEagle3"],
            "bos_token_id": 151643,
            "eos_token_id": 151645,
            **layer,
            "max_position_embeddings": 40960,
            "max_window_layers": 36,
            "rms_norm_eps": 1e-06,
            "rope_scaling": None,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "transformers_version": "4.51.0",
            "use_sliding_window": False,
            "draft_vocab_size": n["draft"],
        }
    method = {"accept_tolerance": 0.0, "proposal_type": "greedy", "speculative_tokens": 5}
    return {
        "architectures": ["Eagle3Speculator"],
        "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"},
        "draft_vocab_size": n["draft"],
        "has_no_defaults_at_init": False,
        "norm_before_residual": True,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{**method, "verifier_accept_k": 1}],
            "verifier": {
                "architectures": ["LlamaForCausalLM"],
                "name_or_path": "meta-llama/Llama-3.1-8B-Instruct",
            },
        },
        "speculators_model_type": "eagle3",
        "speculators_version": "0.1.0.dev14",
        "target_hidden_size": None,
        "torch_dtype": "bfloat16",
        "transformer_layer_config": {
            **layer,
            "max_position_embeddings": 131072,
            "mlp_bias": False,
            "pretraining_tp": 1,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "high_freq_factor": 4.0,
                "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
        },
        "transformers_version": "4.53.2",
    }


def tensors(layout: str, n: dict[str, int]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape of every tensor by its stored name."""
    d, q, kv = n["hidden"], n["heads"] * n["size"], n["kv"] * n["size"]
    first = "layers.0" if layout == "speculators" else "midlayer"
    shapes: dict[str, tuple[int, ...]] = {
        "fc.weight": (d, 3 * d),
        "lm_head.weight": (n["draft"], d),
        f"{first}.hidden_norm.weight": (d,),
        f"{first}.input_layernorm.weight": (d,),
        f"{first}.mlp.down_proj.weight": (d, n["inner"]),
        f"{first}.mlp.gate_proj.weight": (n["inner"], d),
        f"{first}.mlp.up_proj.weight": (n["inner"], d),
        f"{first}.post_attention_layernorm.weight": (d,),
        f"{first}.self_attn.k_proj.weight": (kv, 2 * d),
        f"{first}.self_attn.o_proj.weight": (d, q),
        f"{first}.self_attn.q_proj.weight": (q, 2 * d),
        f"{first}.self_attn.v_proj.weight": (kv, 2 * d),
        "norm.weight": (d,),
    }
    if layout == "speculators":
        shapes["embed_tokens.weight"] = (n["vocab"], d)
    found = {name: (DTYPES[layout], shape) for name, shape in shapes.items()}
    return {**found, "d2t": ("int64", (n["draft"],)), "t2d": ("bool", (n["vocab"],))}


def write_scaled(folder: Path, layout: str) -> Path:
    """The layout with random weights, at scaled sizes."""
    folder.mkdir()
    n = sizes(layout, scaled=True)
    (folder / "config.json").write_text(json.dumps(config(layout, n), indent=2))
    generator = torch.Generator().manual_seed(3)
    values: dict[str, torch.Tensor] = {}
    for name, (dtype, shape) in tensors(layout, n).items():
        value = torch.randn(shape, generator=generator) / shape[-1] ** 0.5
        values[name] = (torch.ones(shape) if "norm" in name else value).to(getattr(torch, dtype))
    kept = torch.randperm(n["vocab"], generator=generator)[: n["draft"]].sort().values
    values["d2t"] = kept - torch.arange(n["draft"])
    values["t2d"] = torch.zeros(n["vocab"], dtype=torch.bool).index_fill_(0, kept, True)
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_zeros(folder: Path, layout: str) -> Path:
    """The layout at its real sizes: a sparse file of zeros, which takes no room on the disk."""
    folder.mkdir()
    n = sizes(layout, scaled=False)
    (folder / "config.json").write_text(json.dumps(config(layout, n)))
    header: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors(layout, n).items():
        start, end = end, end + prod(shape) * getattr(torch, dtype).itemsize
        entry = {"dtype": CODES[dtype], "shape": shape, "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        file.seek(8 + len(text) + header["t2d"]["data_offsets"][0])
        file.write(b"\1" * n["draft"])  # as d2t has it, whose zeros keep the first tokens
    return folder


def write_scaled_target(folder: Path, layout: str) -> Path:
    """A random target of 8 layers with the scaled sizes of Llama-3.1-8B or Qwen3-8B."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    n = sizes(layout, scaled=True)
    kind, theta = (Qwen3Config, 1e6) if layout == "specforge" else (LlamaConfig, 5e5)
    fields = COMMON | {
        "vocab_size": n["vocab"],
        "hidden_size": n["hidden"],
        "intermediate_size": n["inner"],
        "num_attention_heads": n["heads"],
        "num_key_value_heads": n["kv"],
        "head_dim": n["size"],
        "num_hidden_layers": 8,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(kind(**fields)).save_pretrained(folder)
    write_tokenizer(folder, n["vocab"])
    return folder


@pytest.mark.parametrize("layout", DTYPES)
def test_at_its_real_size_it_is_understood(layout: str, tmp_path: Path) -> None:
    found = inspect_draft(write_zeros(tmp_path / layout, layout))
    assert (found.family, found.layout) == (
        "eagle3",
        "speculators" if layout == "speculators" else "eagle",
    )
    assert (found.hidden_size, found.draft_vocab_size, found.dtype) == (4096, 32000, DTYPES[layout])
    assert found.vocab_size == sizes(layout, scaled=False)["vocab"]
    assert found.layer_ids is None
    assert found.shared == ([] if layout == "speculators" else ["embed_tokens.weight"])
    assert found.vocabulary_map == "one to one"
    assert 300e6 < found.parameters < 1000e6
    assert found.fits


@pytest.mark.parametrize("layout", DTYPES)
def test_it_adapts_merges_and_serves(layout: str, tmp_path: Path, vllm_worker: VllmWorker) -> None:
    target = write_scaled_target(tmp_path / "target", layout)
    base = write_scaled(tmp_path / "base", layout)
    found = inspect_draft(base, target)
    assert found.fits, found.checks
    assert found.layer_ids is None
    assert load_draft(base, target).config.layer_ids == DEFAULT_IDS  # type: ignore[attr-defined]

    store = write_store(tmp_path / "store", target, base)
    settings: dict[str, Any] = {"steps": 8, "eval_every": 8, "rank": 4, "batch_size": 8}
    settings |= {"learning_rate": 1e-2, "compiled": False, "tensorboard": False}
    run = tmp_path / "run"
    train(TrainConfig(store=store, draft=base, out=run, arm="afa-lora", **settings))
    merged = tmp_path / "merged"
    parity = merge(run, None, merged)
    assert parity.float32 <= 1e-5
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert list(before) == list(after)
    assert (base / "config.json").read_bytes() == (merged / "config.json").read_bytes()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert len(changed) == parity.changed_tensors == 8  # fc, q k v o, gate up down
    assert inspect_draft(merged, target).fits

    # And through the other layout and back: the same bytes.
    first, second = found.layout, "eagle" if layout == "speculators" else "speculators"
    convert(merged, second, tmp_path / "other")
    back = convert(tmp_path / "other", first, tmp_path / "back").folder
    assert (back / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    assert json.loads((back / "config.json").read_text()) == config(layout, sizes(layout, True))

    vllm_agrees(vllm_worker, target, merged)


def vllm_agrees(worker: VllmWorker, target: Path, folder: Path) -> None:
    """vLLM loads the draft and proposes, token by token, what our module does."""
    k, compared = 3, 0
    reference, draft = Reference(target), load_draft(folder, target).eval()
    runs = vllm_runs(worker, target, folder, k)
    for prompt, run in zip(PROMPTS, runs, strict=True):
        path = prompt + run["output"]
        features = draft.features(*reference.states(path, DEFAULT_IDS))
        known = len(prompt) + 1  # the prompt and the token sampled from it
        for proposal in run["proposed"]:
            if known > len(path):
                break
            assert draft.propose(features[: known - 1], torch.tensor(path[:known]), k) == proposal
            compared += 1
            known += accepted(proposal, path[known:]) + 1
    assert compared > 30
