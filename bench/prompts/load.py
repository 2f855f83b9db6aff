"""The prompts of a run as token ids, later turns included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bench.prompts.conversation import Turns
from bench.prompts.encode import prompt_room
from bench.records.config import BenchConfig

if TYPE_CHECKING:
    from bench.prompts.encode import EncodedPrompt


def load_prompts(config: BenchConfig) -> list[EncodedPrompt]:
    """Read and tokenise the prompts of `config`. Raises `UserError` for what cannot be used."""
    from transformers import AutoTokenizer

    from bench.prompts.encode import encode_prompts
    from bench.prompts.read import read_prompts
    from bench.prompts.rows import as_conversation

    prompts = read_prompts(
        config.prompts,
        limit=config.limit,
        seed=config.seed,
        split=config.split,
        prompt_tokens=config.prompt_tokens,
        suite_folder=config.suite_folder,
    )
    return encode_prompts(
        [as_conversation(prompt) for prompt in prompts],
        AutoTokenizer.from_pretrained(config.target.folder),
        max_positions=config.target.max_positions,
        max_prompt_tokens=config.max_prompt_tokens,
        new_tokens=_new_tokens(config),
        truncate=config.truncate_prompts,
    )


def later_turns(config: BenchConfig, prompts: Sequence[EncodedPrompt]) -> Turns | None:
    """The later turns of `prompts`, None where none has any. `UserError` where they may not fit."""
    if not any(prompt.turns for prompt in prompts):
        return None
    from transformers import AutoTokenizer

    positions = config.target.max_positions
    return Turns(
        prompts,
        AutoTokenizer.from_pretrained(config.target.folder),
        room=prompt_room(positions, _new_tokens(config), config.max_prompt_tokens),
        max_tokens=config.max_tokens,
        truncate=config.truncate_prompts,
    )


def _new_tokens(config: BenchConfig) -> int:
    """Positions that an answer may take, those of the last drafts included."""
    return config.max_tokens + config.k + 1
