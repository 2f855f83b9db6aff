"""What every writer offers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

OnStep = Callable[[float, int], None]  # how much of the block is done, and the new tokens


class Writer(Protocol):
    """What continues prompts. `block` prompts are written together: what is written depends on the
    block and its seed alone, so that it is the same however often a run was interrupted."""

    block: int

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: int,
        temperature: float,
        ends: Sequence[int],
        seed: str,
        longest: int,
        on_step: OnStep,
    ) -> list[list[int]]:
        """Continue each prompt to the first of `ends` (kept), or by `new_tokens`.

        No prompt of the run has more than `longest` tokens with what is written.
        """

    def record(self) -> dict[str, Any]:
        """What decides, beside prompts and settings, what it writes."""

    def close(self) -> None:
        """Free what it holds."""


def number_of(seed: str) -> int:
    """A seed as torch and vLLM take it."""
    return int(hashlib.sha256(seed.encode()).hexdigest()[:15], 16)
