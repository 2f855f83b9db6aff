"""The speculative-decoding settings that vLLM takes, from a target and a draft."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.target.info import TargetInfo

# The n-gram drafter looks for the last 2 to 4 tokens earlier in the text.
NGRAM_LOOKUP = {"prompt_lookup_min": 2, "prompt_lookup_max": 4}

# Kinds of layers whose caches vLLM can treat as one kind.
ATTENTION = {"attention", "full_attention", "sliding_attention", "chunked_attention"}


def speculative_config(
    draft: DraftInfo | Literal["ngram"] | None,
    k: int,
    *,
    draft_sample_method: str | None = None,
) -> dict[str, Any] | None:
    """vLLM's `speculative_config` for `k` tokens per step; None means no speculation.

    The method is that of the draft's family. Raises `UserError` for a k that it cannot draft.
    """
    if draft is None:
        return None
    if k < 1:
        raise UserError(f"k is {k}, expected at least 1", hint="give --k 1 or more (3 is usual)")
    if draft == "ngram":
        return {"method": "ngram", "num_speculative_tokens": k, **NGRAM_LOOKUP}
    if draft.max_k is not None and k > draft.max_k:
        raise UserError(
            f"drafts at most {draft.max_k} tokens a step, not {k}",
            where=draft.folder,
            hint=f"give --k {draft.max_k} or less",
        )
    config: dict[str, Any] = {
        "method": draft.method,
        "model": str(draft.folder),
        "num_speculative_tokens": k,
        **(draft.speculation or {}),
    }
    if draft_sample_method is not None:
        config["draft_sample_method"] = draft_sample_method
    return config


def engine_options(
    target: TargetInfo, draft: DraftInfo | Literal["ngram"] | None
) -> dict[str, bool]:
    """Further options that vLLM's engine needs for this pair.

    vLLM drafts with one group of caches only. It gives each kind of attention (full, sliding) of
    target and draft a group of its own and spreads a draft's layers over them, unless its hybrid
    cache manager is off. A model with recurrent layers (linear attention, Mamba, convolutions)
    needs that manager: vLLM does not start without.
    """
    if draft is None or draft == "ngram":
        return {}
    several = draft.config.get("num_hidden_layers", 1) > 1 and draft.family != "medusa"
    if not several:
        return {}
    folders = [target.folder, *([draft.folder] if draft.family == "draft_model" else [])]
    kinds = [layer_kinds(folder) for folder in folders]
    mixed = any(len(found & ATTENTION) > 1 for found in kinds)
    hybrid = any(found - ATTENTION for found in kinds)
    return {"disable_hybrid_kv_cache_manager": True} if mixed and not hybrid else {}


def layer_kinds(model: Path) -> set[str]:
    """What mixes tokens in the layers of this transformers model, by transformers' names."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
    return set(getattr(config.get_text_config(), "layer_types", None) or [])
