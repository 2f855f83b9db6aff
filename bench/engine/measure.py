"""Run the arms' engines in turns and keep what each gave.

The arms take turns on small blocks of prompts, in an order drawn anew for every block, so that
whatever else the machine does may meet any arm: a fixed rotation would give neighbouring blocks the
same arms, and slow stretches of the machine would favour one again and again. Conversations go
turn by turn within a block, and each (conversation, turn) then counts as a prompt.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from bench.prompts.conversation import Batches, Turns, schedule
from bench.records.config import BenchConfig
from bench.records.progress import Progress
from bench.records.run import ArmRun
from serving.engine.shared import Engine


def measure(
    config: BenchConfig,
    engines: Mapping[str, Engine],
    prompts: list[list[int]],
    progress: Progress = lambda stage, done, total: None,
    turns: Turns | None = None,
) -> list[ArmRun]:
    """Warm every engine up, as many requests at once as are measured, then run all rounds with the
    arms interleaved.

    `prompts` are the first turns; what an arm gave is in the order of
    `bench.prompts.conversation.units`.
    """
    runs = [ArmRun(arm, engines[arm.name].description) for arm in config.arms]
    for done, run in enumerate(runs):
        progress("warming up", done, len(runs))
        count = max(config.warmup, config.concurrency) if config.warmup else 0
        for start in range(0, min(count, len(prompts)), config.concurrency):
            batch = prompts[start : start + config.concurrency]
            engines[run.arm.name].generate(batch, config.max_tokens, ignore_eos=True)
    progress("warming up", len(runs), len(runs))
    blocks = plan_blocks(config, len(prompts), turns)
    requests = sum(len(batch) for batches in blocks for batch in batches)
    total, done = config.rounds * requests * len(runs), 0
    order = random.Random(config.seed)
    for round_index in range(config.rounds):
        for batches in blocks:
            for run in order.sample(runs, len(runs)):
                progress("measuring", done, total)
                _run_block(config, run, round_index, engines[run.arm.name], batches, prompts, turns)
                done += sum(map(len, batches))
    progress("measuring", total, total)
    return runs


def plan_blocks(config: BenchConfig, prompts: int, turns: Turns | None) -> list[Batches]:
    """The blocks in which the arms take turns, as batches of conversation numbers."""
    size = max(config.block, config.concurrency)
    return schedule(turns.later if turns else [0] * prompts, size)


def _run_block(
    config: BenchConfig,
    run: ArmRun,
    round_index: int,
    engine: Engine,
    batches: Batches,
    prompts: list[list[int]],
    turns: Turns | None,
) -> None:
    """All turns of a block of conversations in one arm, a turn of all of them at a time."""
    answers: dict[int, list[list[int]]] = {i: [] for i in batches[0]}
    for batch in batches:
        inputs = []
        for i in batch:
            ids = prompts[i]
            if turns and answers[i]:
                ids, cut = turns.prompt(i, answers[i])
                run.cut += cut
            inputs.append(ids)
        generation = engine.generate(inputs, config.max_tokens, ignore_eos=config.ignore_eos)
        run.add(round_index, generation, config.concurrency)
        if round_index == 0:
            run.inputs += inputs
        for i, request in zip(batch, generation.requests, strict=True):
            answers[i].append(request.output_ids)
