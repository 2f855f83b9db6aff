"""Run the arms' engines in turns and keep what each gave.

The arms take turns on small blocks of prompts, in an order that rotates with every block, so that
whatever else the machine does meets all arms alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.acceptance import Acceptance
from bench.arms import Arm
from bench.config import BenchConfig
from serving.engine import EngineProcess, Generation
from serving.metrics import SpecCounters

Progress = Callable[[str, int, int], None]  # stage, done, total


@dataclass
class ArmRun:
    """What one arm gave: per round and prompt its output, per round and timing unit its times.

    A timing unit is a prompt, or a whole block where several requests run at once. `tokens` and
    `seconds` are those of the decode phase: the first token belongs to the prefill.
    """

    arm: Arm
    engine: dict[str, Any] = field(default_factory=dict)
    outputs: list[list[list[int]]] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    seconds: list[list[float]] = field(default_factory=list)
    prefill_seconds: list[list[float]] = field(default_factory=list)
    counters: list[list[SpecCounters | None]] = field(default_factory=list)

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
) -> list[ArmRun]:
    """Warm every engine up, then run all rounds with the arms interleaved."""
    runs = [ArmRun(arm, engines[arm.name].description) for arm in config.arms]
    for done, run in enumerate(runs):
        progress("warming up", done, len(runs))
        for prompt in prompts[: config.warmup]:
            engines[run.arm.name].generate([prompt], config.max_tokens, ignore_eos=True)
    progress("warming up", len(runs), len(runs))
    size = max(config.block, config.concurrency)
    blocks = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    total, done = config.rounds * len(prompts) * len(runs), 0
    for round_index in range(config.rounds):
        for block_index, block in enumerate(blocks):
            shift = (round_index + block_index) % len(runs)
            for run in runs[shift:] + runs[:shift]:
                progress("measuring", done, total)
                generation = engines[run.arm.name].generate(
                    block, config.max_tokens, ignore_eos=config.ignore_eos
                )
                run.add(round_index, generation, config.concurrency)
                done += len(block)
    progress("measuring", total, total)
    return runs
