"""A trained draft as it will be served, without writing it to disk."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from afaspec.adapter import read_record, refuse_non_linear
from afaspec.merging import load_result, merged_weights
from bench.offline import Captured, offline_acceptance
from drafts.checkpoint import load_draft, module_names, read_draft_info
from drafts.draft import Draft
from drafts.tensors import open_tensors


def merged_draft(base: Path, target: Path, result: Path) -> Draft:
    """What `merge` would write and `load_draft` read: merged weights, rounded to the base's types.

    Raises `UserError` for an adapter that is not linear yet.
    """
    refuse_non_linear(read_record(result).beta, where=result)
    weights = merged_weights(load_result(load_draft(base, target), result))
    merged = load_draft(base, target).eval()
    stored = open_tensors(base)
    for name, own in module_names(read_draft_info(base)).items():
        if own in weights:
            weights[own] = weights[own].to(stored.load(name).dtype)
    merged.load_state_dict({n: w.float() for n, w in weights.items()}, strict=False)
    return merged


def counted(draft: Draft, sequences: Iterable[Captured], k: int) -> dict[str, list]:
    """Offline acceptance as counts: `drafts` [prompts], and `accepted` [prompts][k]."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = offline_acceptance(draft.to(device).eval(), sequences, k)
    return {
        "drafts": found.drafts_per_prompt.tolist(),
        "accepted": found.accepted_per_prompt.tolist(),
    }
