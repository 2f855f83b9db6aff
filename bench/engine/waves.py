"""Measure engines in waves of requests, taking turns wave by wave."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Mapping
from typing import TypeVar

from bench.records.config import Condition
from bench.records.run import Series
from drafts.errors import UserError
from serving.engine.engine import EngineProcess, Generation

Name = TypeVar("Name", bound=Hashable)


def measure_waves(
    engines: Mapping[Name, EngineProcess],
    prompts: list[list[int]],
    condition: Condition,
    rounds: int,
    *,
    ignore_eos: bool = False,
    progress: Callable[[int], None] = lambda done: None,
) -> tuple[dict[Name, Series], dict[Name, str]]:
    """Warm every engine up with one wave, then run all rounds with the engines interleaved.

    Returns what each engine gave, and why those that failed at the warm-up did. `progress` is told
    how many requests are done. `prompts` make whole waves of the condition's concurrency.
    """
    size = condition.concurrency
    waves = [prompts[start : start + size] for start in range(0, len(prompts), size)]
    series: dict[Name, Series] = {}
    failed: dict[Name, str] = {}
    for name, engine in engines.items():
        engine.temperature = condition.temperature
        try:
            engine.generate(waves[0], condition.max_tokens, ignore_eos=True)
        except UserError as error:
            failed[name] = str(error)
        else:
            series[name] = Series()
    names, done, order = list(series), 0, random.Random(0)  # drawn anew, as in `measure`
    for round_index in range(rounds):
        for wave in waves:
            for name in order.sample(names, len(names)):
                generation = engines[name].generate(
                    wave, condition.max_tokens, ignore_eos=ignore_eos
                )
                _add(series[name], round_index, generation, engines[name].settings.k)
                done += len(wave)
                progress(done)
    return series, failed


def _add(series: Series, round_index: int, generation: Generation, k: int) -> None:
    for table in vars(series).values():
        if len(table) == round_index:
            table.append([])
    series.wave_seconds[round_index].append(generation.decode_seconds)
    for request in generation.requests:
        spec = request.counters
        accepted = list(spec.accepted_per_position) if spec else []
        series.tokens[round_index].append(len(request.output_ids) - 1)
        series.seconds[round_index].append(request.decode_seconds)
        series.drafts[round_index].append(spec.drafts if spec else 0)
        series.drafted[round_index].append(spec.draft_tokens if spec else 0)
        series.accepted[round_index].append(accepted + [0] * (k - len(accepted)))
