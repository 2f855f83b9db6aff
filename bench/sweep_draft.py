"""What a sweep remembers of a draft: whether it is the same one, and whether it costs the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from bench.arms import Arm
from drafts.checkpoint import module_names, read_draft_info
from drafts.tensors import open_tensors

ONE_PASS = ("peagle", "dflash")  # families that draft all tokens in one forward pass


def describe_draft(arm: Arm) -> dict[str, Any]:
    """Identity and cost class: drafts of one `shape` have the same layers of the same sizes.

    `one_pass` says that k tokens take one forward pass; other drafts run one after the other.
    `max_k` is the most tokens that it drafts in a step, None for any number.
    """
    if not isinstance(arm.draft, Path):
        return {
            "sha256": None,
            "family": "ngram",
            "shape": "ngram",
            "one_pass": True,
            "max_k": None,
        }
    info = read_draft_info(arm.draft)
    names = module_names(info)
    headers = open_tensors(arm.draft).headers
    shapes = sorted((names[stored], list(header.shape)) for stored, header in headers.items())
    return {
        "sha256": info.sha256,
        "family": info.family,
        "shape": hashlib.sha256(json.dumps([info.family, shapes]).encode()).hexdigest()[:12],
        "one_pass": info.family in ONE_PASS,
        "max_k": info.max_k,
    }
