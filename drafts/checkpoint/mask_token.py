"""The mask token of a parallel draft: what stands in the slots whose tokens are not known yet."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drafts.errors import UserError
from drafts.target.info import TargetInfo

MASK_TOKEN = ("mask_token_id", "pard_token", "ptd_token_id")  # fields that name it, in vLLM's order


def mask_token(flat: dict[str, Any]) -> Any:
    """What a draft's config says of it; None where it says nothing."""
    return next((flat[key] for key in MASK_TOKEN if flat.get(key) is not None), None)


def check_mask_token(token: Any, vocab_size: int, path: Path, field: str) -> int:
    """`token` as the config at `path` gives it in `field`. Raises `UserError` for a wrong one."""
    hint = f"write into {field} the mask token that the draft was trained with"
    if token is None:
        raise UserError("names no mask token, which parallel drafting needs", where=path, hint=hint)
    if not isinstance(token, int) or not 0 <= token < vocab_size:
        raise UserError(
            f"{field} is {token!r}, expected a token id below {vocab_size}", where=path, hint=hint
        )
    return token


def init_mask_token(target: TargetInfo) -> int:
    """The mask token of a fresh draft: the highest id of the target's vocabulary.

    It is a reserved or padding row in most of them, and else the rarest merge of the tokenizer.
    """
    return target.vocab_size - 1
