"""The speculative-decoding settings that vLLM takes, from a target and a draft."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args

from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.files import read_json
from drafts.target.info import TargetInfo
from serving.runtime import has_gpu

# What drafts without a checkpoint of its own: looking the last tokens up earlier in the text, a
# suffix tree over it (arXiv 2411.04975), and the prediction layers that a target brings itself.
WithoutFolder = Literal["ngram", "suffix", "mtp"]
WITHOUT_FOLDER: tuple[WithoutFolder, ...] = get_args(WithoutFolder)
Drafter = DraftInfo | WithoutFolder | None

K = "num_speculative_tokens"
USUAL_K = 3
BLOCKS = ("dflash", "dspark")  # methods whose drafts fill a block of a size of their own
NO_FIELDS: Mapping[str, Any] = MappingProxyType({})
# The fields of those without a folder, where a user gives no others. N-gram looks for the last 2 to
# 4 tokens. A suffix tree over earlier answers would make a prompt that comes again no test.
METHOD_FIELDS: dict[WithoutFolder, dict[str, Any]] = {
    "ngram": {"prompt_lookup_min": 2, "prompt_lookup_max": 4},
    "suffix": {"suffix_decoding_max_cached_requests": 0},
    "mtp": {},
}
# Methods of vLLM's second model runner alone, which needs Triton; how we call their drafts.
GPU_ALONE = {"dspark": "DSpark"}
SUFFIX_PACKAGE = "arctic_inference"
# Where a config.json counts the layers that predict further tokens, by the names in use.
MTP_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")

# Kinds of layers whose caches vLLM can treat as one kind.
ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention"}


def speculative_config(
    draft: Drafter,
    k: int,
    *,
    draft_sample_method: str | None = None,
    fields: Mapping[str, Any] = NO_FIELDS,
) -> dict[str, Any] | None:
    """vLLM's `speculative_config` for `k` tokens per step; None means no speculation.

    The method is that of the draft's family; `fields` are further ones, and count more than ours.
    Raises `UserError` for a k that it cannot draft.
    """
    if draft is None:
        return None
    k = fields.get(K, k)
    if not isinstance(k, int) or k < 1:
        raise UserError(f"k is {k}, expected at least 1", hint="give --k 1 or more (3 is usual)")
    if not isinstance(draft, DraftInfo):
        return {"method": draft, **METHOD_FIELDS[draft], **fields, K: k}
    if draft.max_k is not None and k > draft.max_k:
        raise UserError(
            f"drafts at most {draft.max_k} tokens a step, not {k}",
            where=draft.folder,
            hint=f"give --k {draft.max_k} or less",
        )
    config: dict[str, Any] = {
        "method": draft.method,
        "model": str(draft.folder),
        **(draft.speculation or {}),
    }
    if draft_sample_method is not None:
        config["draft_sample_method"] = draft_sample_method
    return {**config, **fields, K: k}


def usual_k(draft: Drafter) -> int:
    """How many tokens a step a user wants who does not say: 3, or a block drafter's whole block.

    What such a draft says depends on how many tokens it drafts, and it was trained for those.
    """
    if not isinstance(draft, DraftInfo) or draft.max_k is None:
        return USUAL_K
    most = draft.max_k
    return most if draft.method in BLOCKS else min(USUAL_K, most)


def require_drafter(
    target: TargetInfo, draft: Drafter, fields: Mapping[str, Any] = NO_FIELDS
) -> None:
    """Raise `UserError` where vLLM could not draft so: before it starts, and by what is there.

    `fields` are a user's, of vLLM's `speculative_config`. That a draft fits its target is the
    business of `serving.compatibility`.
    """
    if unknown := [name for name in fields if name not in speculative_fields()]:
        raise UserError(
            f"this vLLM's --speculative-config has no field {unknown[0]!r}",
            hint=f"it has {', '.join(sorted(speculative_fields()))}",
        )
    if isinstance(draft, DraftInfo) and draft.method in GPU_ALONE and not has_gpu():
        raise UserError(
            f"vLLM serves {GPU_ALONE[draft.method]} drafts on GPUs alone",
            where=draft.folder,
            hint="serve and measure it on a machine with a GPU; capture, train, merge and offline "
            "acceptance work here",
        )
    if draft == "suffix" and importlib.util.find_spec(SUFFIX_PACKAGE) is None:
        raise UserError(
            "vLLM's suffix decoding needs the package arctic-inference, which is not installed",
            hint="pip install arctic-inference==0.1.1",
        )
    if draft == "mtp" and not predicts_further(target.folder):
        raise UserError(
            f"this target brings no layers that draft ({', '.join(MTP_LAYERS)} in config.json)",
            where=target.folder / "config.json",
            hint="take a target that does, or --draft NAME=FOLDER",
        )


@lru_cache(maxsize=1)
def speculative_fields() -> frozenset[str]:
    """The fields that a user may give, of the installed vLLM; read, for importing it takes long."""
    package = importlib.util.find_spec("vllm")
    assert package is not None
    assert package.origin is not None
    source = (Path(package.origin).parent / "config" / "speculative.py").read_text(encoding="utf-8")
    (found,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "SpeculativeConfig"
    )
    names = {
        line.target.id
        for line in found.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
    }
    ours = {"model", "method"}  # which say what drafts, as an arm does
    made = {"target_model_config", "target_parallel_config", "draft_parallel_config"}
    return frozenset(names - ours - made)


def predicts_further(folder: Path) -> bool:
    """Whether the model's config.json counts layers that predict further tokens."""
    config = read_json(folder / "config.json")
    texts = (config, config.get("text_config") or {})
    return any((text.get(name) or 0) > 0 for text in texts for name in MTP_LAYERS)


def engine_options(target: TargetInfo, draft: Drafter) -> dict[str, bool]:
    """Further options that vLLM's engine needs for this pair.

    vLLM drafts with one group of caches only. It gives each kind of attention (full, sliding) of
    target and draft a group of its own and spreads a draft's layers over them, unless its hybrid
    cache manager is off. A model with recurrent layers (linear attention, Mamba, convolutions)
    needs that manager: vLLM does not start without.
    """
    if not isinstance(draft, DraftInfo):
        return {}
    several = draft.config.get("num_hidden_layers", 1) > 1 and draft.family != "medusa"
    if not several:
        return {}
    folders = [target.folder, *([draft.folder] if draft.method == "draft_model" else [])]
    kinds = [layer_kinds(folder) for folder in folders]
    mixed = any(len(found & ATTENTION) > 1 for found in kinds)
    hybrid = any(found - ATTENTION for found in kinds)
    return {"disable_hybrid_kv_cache_manager": True} if mixed and not hybrid else {}


def layer_kinds(model: Path) -> set[str]:
    """What mixes tokens in the layers of this transformers model, by transformers' names."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    return set(getattr(config.get_text_config(), "layer_types", None) or [])
