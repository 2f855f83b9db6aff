"""Writing with transformers in this process."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from afaspec.capture.memory import LARGEST_BATCH
from afaspec.capture.plan import Setup
from afaspec.capture.target_model import load_target
from afaspec.capture.writers.protocol import OnStep, number_of

if TYPE_CHECKING:
    from afaspec.capture.features import Keeper


class TransformersWriter:
    """The model in this process, which gives the features too."""

    def __init__(self, setup: Setup):
        self.setup = setup
        self.block = setup.config.batch_size or LARGEST_BATCH[setup.device]

    @cached_property
    def model(self) -> Any:
        """The loaded target."""
        return load_target(self.setup.target.folder, self.setup.dtype, self.setup.device)

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
        keeper: Keeper | None = None,
    ) -> list[list[int]]:
        from afaspec.capture.generate import generate

        return generate(
            self.model,
            prompts,
            max_new_tokens=new_tokens,
            temperature=temperature,
            end_ids=frozenset(ends),
            seed=number_of(seed),
            on_step=lambda step, tokens: on_step((step + 1) / new_tokens, tokens),
            keeper=keeper,
        )

    def record(self) -> dict[str, Any]:
        return {"with": "transformers", "dtype": self.setup.dtype, "block": self.block}

    def close(self) -> None:
        self.__dict__.pop("model", None)
