"""The turns of prompts, written by the target: batch by batch, or all of them ahead by vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from afaspec.capture.journal import Journal
from afaspec.capture.plan import Asked, CapturePlan
from afaspec.capture.turns import Turn
from afaspec.capture.writers.protocol import OnStep, Writer

JOURNAL = "answers.jsonl"  # in the store's folder until the store is complete


def write_turns(
    plan: CapturePlan,
    write: Callable[..., list[list[int]]],
    batch: Sequence[int],
    seed: str,
    longest: int,
    step: OnStep,
) -> list[list[Turn]]:
    """The turns of each of the batch's prompts, one turn of all after another.

    `write` is a writer's method of that name.
    """
    config, prompts = plan.config, [plan.prompts[i] for i in batch]
    most = max(len(asked.turns) for asked in prompts)
    turns: list[list[Turn]] = [[] for _ in prompts]
    for turn in range(most):
        rows = [row for row, asked in enumerate(prompts) if len(asked.turns) > turn]
        inputs = [_next_prompt(plan, prompts[row], turns[row]) for row in rows]

        def told(fraction: float, tokens: int, turn: int = turn) -> None:
            step((turn + fraction) / most, tokens)

        answers = write(
            inputs,
            new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            ends=plan.ends,
            seed=seed + f":{turn}" * (turn > 0),
            longest=longest,
            on_step=told,
        )
        for row, ids, answer in zip(rows, inputs, answers, strict=True):
            turns[row].append(Turn(ids, answer))
    return turns


def write_ahead(
    plan: CapturePlan,
    writer: Writer,
    longest: int,
    on_progress: Callable[[float, int], None],
    begin: int = 0,
) -> list[list[Turn]]:
    """The turns of the prompts from number `begin` on; what a run before has written is taken from
    its journal.

    `on_progress` is told how many prompts are done, in parts, and the tokens of this run.
    """
    journal = open_journal(plan, writer)
    answers: list[list[list[int]]] = [one for block in journal.blocks for one in block]
    turns = [_answered(plan, begin + i, found) for i, found in enumerate(answers)]
    tokens = 0
    for start in range(begin + len(turns), len(plan.prompts), writer.block):
        block = range(start, min(start + writer.block, len(plan.prompts)))

        def step(fraction: float, new: int, block: range = block) -> None:
            nonlocal tokens
            tokens += new
            on_progress(block.start + fraction * len(block), tokens)

        number = f"from {start}" if begin else start // writer.block
        seed = f"{plan.seed}:{number}"
        written = write_turns(plan, writer.write, block, seed, longest, step)
        journal.add([[turn.answer for turn in of] for of in written])
        turns += written
    return turns


def open_journal(plan: CapturePlan, writer: Writer) -> Journal:
    """The journal of this plan's answers. `UserError` for one of other settings."""
    config = plan.config
    settings = {
        "target": plan.target.sha256,
        "prompts_sha256": plan.prompts_sha256,
        "max_new_tokens": config.max_new_tokens,
        "temperature": config.temperature,
        "seed": config.seed,
        "ends": plan.ends,
        **writer.record(),
    }
    return Journal.open(config.out / JOURNAL, settings, overwrite=config.overwrite)


def _answered(plan: CapturePlan, number: int, answers: list[list[int]]) -> list[Turn]:
    turns: list[Turn] = []
    for answer in answers:
        turns.append(Turn(_next_prompt(plan, plan.prompts[number], turns), answer))
    return turns


def _next_prompt(plan: CapturePlan, asked: Asked, before: list[Turn]) -> list[int]:
    """Token ids of the turn after `before`, whose answers are carried forward as text."""
    dialogue = asked.prompt.dialogue
    if dialogue is None or not before:
        return asked.prompt.input_ids
    decode = plan.encoder.tokenizer.decode
    said = [decode(turn.answer, skip_special_tokens=True) for turn in before]
    return replace(plan.encoder, truncate=True).ask(dialogue, said).ids
