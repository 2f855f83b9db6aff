"""Run the arms' engines in turns and keep what each gave.

The arms take turns on small blocks of prompts, in an order drawn anew for every block, so that
whatever else the machine does may meet any arm: a fixed rotation would give neighbouring blocks the
same arms, and slow stretches of the machine would favour one again and again. Conversations go
turn by turn within a block, and each (conversation, turn) then counts as a prompt.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from bench.prompts.conversation import Batches, schedule
from bench.prompts.conversation import Turns as Conversations
from bench.records.arms import Arm
from bench.records.config import BenchConfig
from bench.records.progress import Progress
from bench.records.run import ArmRun
from bench.records.turns import Turns
from serving.engine.engine import Generation
from serving.engine.shared import Engine


def measure(
    config: BenchConfig,
    arms: Sequence[Arm],
    engines: Mapping[str, Engine],
    prompts: list[list[int]],
    progress: Progress = lambda stage, done, total: None,
    turns: Conversations | None = None,
    ended: Turns[Generation] | None = None,
) -> list[ArmRun]:
    """Warm every engine up, as many requests at once as are measured, then run all rounds with the
    arms interleaved.

    `prompts` are the first turns; what an arm gave is in the order of
    `bench.prompts.conversation.units`. What `ended` has was measured before, and the rest is added
    to it.
    """
    ended = ended or Turns[Generation]()
    runs = [ArmRun(arm, engines[arm.name].description) for arm in arms]
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
        for block, batches in enumerate(blocks):
            for run in order.sample(runs, len(runs)):
                progress("measuring", done, total)
                engine, place = engines[run.arm.name], (round_index, block)
                _run_block(config, run, place, engine, batches, prompts, turns, ended)
                done += sum(map(len, batches))
    progress("measuring", total, total)
    for run in runs:
        run.engine = {**run.engine, "threads": engines[run.arm.name].threads()}
    return runs


def plan_blocks(config: BenchConfig, prompts: int, turns: Conversations | None) -> list[Batches]:
    """The blocks in which the arms take turns, as batches of conversation numbers."""
    size = max(config.block, config.concurrency)
    return schedule(turns.later if turns else [0] * prompts, size)


def _run_block(
    config: BenchConfig,
    run: ArmRun,
    place: tuple[int, int],
    engine: Engine,
    batches: Batches,
    prompts: list[list[int]],
    turns: Conversations | None,
    ended: Turns[Generation],
) -> None:
    """All turns of a block of conversations in one arm, a turn of all of them at a time.

    `place` is that of the round and of the block in it.
    """
    round_index = place[0]
    answers: dict[int, list[list[int]]] = {i: [] for i in batches[0]}
    for number, batch in enumerate(batches):
        inputs = []
        for i in batch:
            ids = prompts[i]
            if turns and answers[i]:
                ids, cut = turns.prompt(i, answers[i])
                run.cut += cut
            inputs.append(ids)
        key = (run.arm.name, *place, number)
        if key not in ended.ended:
            new = engine.generate(inputs, config.max_tokens, ignore_eos=config.ignore_eos)
            ended.add(key, new)
        generation = ended.ended[key]
        run.add(round_index, generation, config.concurrency)
        if round_index == 0:
            run.inputs += inputs
        for i, request in zip(batch, generation.requests, strict=True):
            answers[i].append(request.output_ids)
