"""Run the arms' engines in turns and keep what each gave.

The arms take turns on small blocks of prompts, in an order drawn anew for every block, so that
whatever else the machine does may meet any arm: a fixed rotation would give neighbouring turns the
same arms, and slow stretches of the machine would favour one again and again. Conversations go
turn by turn within an arm's turn, and each (conversation, turn) then counts as a prompt.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.acceptance import Acceptance
from bench.arms import Arm
from bench.config import BenchConfig
from bench.conversation import Turns, Waves, schedule
from serving.engine import EngineProcess, Generation
from serving.metrics import SpecCounters

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass
class ArmRun:
    """What one arm gave: per round and prompt its output, per round and timing unit its times.

    A timing unit is a prompt, or a whole block where several requests run at once. `tokens` and
    `seconds` are those of the decode phase: the first token belongs to the prefill. `inputs` are
    the first round's prompts as this arm had them, `cut` counts the later turns of all rounds that
    had to lose their first tokens to fit.
    """

    arm: Arm
    engine: dict[str, Any] = field(default_factory=dict)
    outputs: list[list[list[int]]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    prefill_seconds: list[list[float]] = field(default_factory=list)
    counters: list[list[SpecCounters | None]] = field(default_factory=list)
    inputs: list[list[int]] = field(default_factory=list)
    cut: int = 0

    def add(self, round_index: int, generation: Generation, concurrency: int) -> None:
        """Append one block of prompts to a round."""
        tables: list[list[list[Any]]] = [
            self.outputs,
            self.tokens,
            self.seconds,
            self.prefill_seconds,
            self.counters,
        ]
        for table in tables:
            if len(table) == round_index:
                table.append([])
        requests = generation.requests
        self.outputs[round_index] += [r.output_ids for r in requests]
        self.prefill_seconds[round_index] += [r.prefill_seconds for r in requests]
        self.counters[round_index] += [r.counters for r in requests]
        decoded = [len(r.output_ids) - 1 for r in requests]
        if concurrency == 1:
            self.tokens[round_index] += decoded
            self.seconds[round_index] += [r.decode_seconds for r in requests]
        else:
            self.tokens[round_index].append(sum(decoded))
            self.seconds[round_index].append(generation.decode_seconds)

    def acceptance(self, k: int) -> Acceptance | None:
        """Counts per prompt over all rounds; None without speculation."""
        rounds = [
            Acceptance.from_counters([c for c in row if c is not None], k)
            for row in self.counters
            if None not in row
        ]
        if not rounds:
            return None
        return Acceptance(
            sum(r.drafts_per_prompt for r in rounds),  # type: ignore[arg-type]
            sum(r.accepted_per_prompt for r in rounds),  # type: ignore[arg-type]
            sum(r.drafted for r in rounds),  # type: ignore[arg-type]
        )

    @property
    def repeatable(self) -> bool:
        """Whether every round gave the same output."""
        return all(outputs == self.outputs[0] for outputs in self.outputs)


def measure(
    config: BenchConfig,
    engines: Mapping[str, EngineProcess],
    prompts: list[list[int]],
    progress: Progress = lambda stage, done, total: None,
    turns: Turns | None = None,
) -> list[ArmRun]:
    """Warm every engine up, then run all rounds with the arms interleaved.

    `prompts` are the first turns; what an arm gave is in the order of `bench.conversation.units`.
    """
    runs = [ArmRun(arm, engines[arm.name].description) for arm in config.arms]
    for done, run in enumerate(runs):
        progress("warming up", done, len(runs))
        for prompt in prompts[: config.warmup]:
            engines[run.arm.name].generate([prompt], config.max_tokens, ignore_eos=True)
    progress("warming up", len(runs), len(runs))
    blocks = plan_blocks(config, len(prompts), turns)
    requests = sum(len(wave) for waves in blocks for wave in waves)
    total, done = config.rounds * requests * len(runs), 0
    order = random.Random(config.seed)
    for round_index in range(config.rounds):
        for waves in blocks:
            for run in order.sample(runs, len(runs)):
                progress("measuring", done, total)
                _run_block(config, run, round_index, engines[run.arm.name], waves, prompts, turns)
                done += sum(map(len, waves))
    progress("measuring", total, total)
    return runs


def plan_blocks(config: BenchConfig, prompts: int, turns: Turns | None) -> list[Waves]:
    """The blocks in which the arms take turns, as waves of conversation numbers."""
    size = max(config.block, config.concurrency)
    return schedule(turns.later if turns else [0] * prompts, size)


def _run_block(
    config: BenchConfig,
    run: ArmRun,
    round_index: int,
    engine: EngineProcess,
    waves: Waves,
    prompts: list[list[int]],
    turns: Turns | None,
) -> None:
    """All turns of a block of conversations in one arm, a turn of all of them at a time."""
    answers: dict[int, list[list[int]]] = {i: [] for i in waves[0]}
    for wave in waves:
        inputs = []
        for i in wave:
            ids = prompts[i]
            if turns and answers[i]:
                ids = turns.prompt(i, answers[i])
                run.cut += len(ids) > turns.longest
                ids = ids[-turns.longest :]
            inputs.append(ids)
        generation = engine.generate(inputs, config.max_tokens, ignore_eos=config.ignore_eos)
        run.add(round_index, generation, config.concurrency)
        if round_index == 0:
            run.inputs += inputs
        for i, request in zip(wave, generation.requests, strict=True):
            answers[i].append(request.output_ids)
