"""The prompts of a run as token ids, later turns included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from bench.prompts.conversation import Turns
from bench.prompts.encode import EncodedPrompt, encode_prompts, prompt_room
from bench.prompts.read import read_prompts
from bench.prompts.rows import Prompt, as_conversation
from bench.records.config import BenchConfig
from bench.records.settings import MeasureSettings


def conversations(
    config: MeasureSettings, source: str, note: Callable[[str], None] | None = None
) -> list[Prompt]:
    """The prompts of `source` that `config` takes. Raises `UserError` for what cannot be read.

    `note` is told what was passed over.
    """
    prompts = read_prompts(source, config, seed=config.seed, note=note)
    return [as_conversation(prompt) for prompt in prompts]


def distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number added to those that come again."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return found


def load_prompts(
    config: BenchConfig, note: Callable[[str], None] | None = None
) -> list[EncodedPrompt]:
    """Read and tokenise the prompts of `config`. Raises `UserError` for what cannot be used."""
    from transformers import AutoTokenizer

    return encode_prompts(
        conversations(config, config.prompts, note),
        AutoTokenizer.from_pretrained(config.target.folder),
        max_positions=config.target.max_positions,
        max_prompt_tokens=config.max_prompt_tokens,
        new_tokens=new_tokens(config),
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
        room=prompt_room(positions, new_tokens(config), config.max_prompt_tokens),
        max_tokens=config.max_tokens,
        truncate=config.truncate_prompts,
    )


def new_tokens(config: BenchConfig) -> int:
    """Positions that an answer may take, those of the last drafts included."""
    return config.max_tokens + config.k + 1
