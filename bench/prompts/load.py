"""The prompts of a run as token ids, later turns included."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.prompts.conversation import Turns
from bench.prompts.encode import EncodedPrompt, Encoder, encode_prompts, make_encoder
from bench.prompts.read import read_prompts
from bench.prompts.rows import Prompt, as_conversation
from bench.prompts.template import ChatTemplate, today
from bench.records.config import BenchConfig
from bench.records.settings import MeasureSettings, PromptSettings
from drafts.target.info import TargetInfo


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


def make_bench_encoder(config: BenchConfig) -> Encoder:
    """How the prompts of `config` become token ids of its target. Raises `UserError`."""
    return make_encoder(
        chat_template(config.target.folder, config),
        max_positions=config.target.max_positions,
        max_prompt_tokens=config.max_prompt_tokens,
        new_tokens=new_tokens(config),
        truncate=config.truncate_prompts,
    )


def chat_template(folder: Path, config: PromptSettings) -> ChatTemplate:
    """The chat template of the target in `folder`, told what `config` says; today without date."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return ChatTemplate(tokenizer, config.chat_template_kwargs, config.chat_date or today())


def template_record(target: TargetInfo | None, config: PromptSettings) -> dict[str, Any]:
    """What a result carries of the chat template; of a server's own only what it is told."""
    if target is None:
        return {"chat_template_kwargs": config.chat_template_kwargs}
    return chat_template(target.folder, config).record()


def load_prompts(
    config: BenchConfig, note: Callable[[str], None] | None = None
) -> list[EncodedPrompt]:
    """Read and tokenise the prompts of `config`. Raises `UserError` for what cannot be used."""
    return encode_prompts(
        conversations(config, config.prompts, note),
        make_bench_encoder(config),
        config.prompts,
        skip_bad=config.skip_bad_rows,
        note=note,
    )


def later_turns(config: BenchConfig, prompts: Sequence[EncodedPrompt]) -> Turns | None:
    """The later turns of `prompts`, None where none has any. `UserError` where they may not fit."""
    if not any(prompt.later for prompt in prompts):
        return None
    return Turns(prompts, make_bench_encoder(config), max_tokens=config.max_tokens)


def new_tokens(config: BenchConfig) -> int:
    """Positions that an answer may take, those of the last drafts included."""
    return config.max_tokens + config.most_k + 1
