"""The report of a run against servers: the same keys as in process, with latencies and loads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.lossless.greedy import Difference, Noise, first_difference
from bench.records.acceptance import Acceptance
from bench.records.arms import Arm
from bench.records.run import Answer, ArmRun
from bench.records.speeds import REQUEST, THROUGHPUT, Speed
from bench.report.build import build_report
from bench.report.cautions import past_positions
from bench.report.figures import acceptance_json, accepted_lengths, figure_json
from bench.report.schema import Report
from bench.server.checks import warnings_of
from bench.server.measure import LoadRun, block_size
from bench.stats.latency import (
    arrival_figures,
    client_figures,
    goodput_figures,
    latency_figures,
)
from bench.stats.resample import Resampler, Samples, ratio
from serving.metrics import SpecCounters, sum_counters

Json = dict[str, Any]
Table = NDArray[np.float64]

EQUAL_OUTPUT_NEEDS = 1  # with more at once, batches differ from run to run, and roundings with them


def build_server_report(
    results: Sequence[Sequence[LoadRun]],
    *,
    arms: Mapping[str, Arm],
    common: Json,
    provenance: Mapping[str, Json],
    prompts: Sequence[str],
    categories: Sequence[str | None] | None,
    differences: Mapping[str, list[Difference]] | None = None,
    noise: Noise | None = None,
    prompt_tokens: Sequence[int | None] | None = None,
    warnings: Mapping[str, Sequence[str]] = {},
    seed: int = 0,
) -> Report:
    """Figures and comparisons of every load; the report's own are those of the first.

    `differences` from the output without speculation are those at concurrency 1. `prompt_tokens`
    are the lengths of the prompts as far as they are known here; `warnings` by arm what was known
    before the run.
    """
    # Where arrivals set how much all requests get together, a draft can only speed up each of them.
    speed = REQUEST if any(runs[0].load.is_paced for runs in results) else THROUGHPUT
    steps = []
    for runs in results:
        load, used = runs[0].load, runs[0].prompts
        size = sum(len(block.answers) for block in runs[0].rounds[0])
        alone = load.concurrency == EQUAL_OUTPUT_NEEDS
        report = build_report(
            [as_arm_run(run, arms[run.name], speed) for run in runs],
            common={**common, "block": block_size(load, size, used)},
            provenance=provenance,
            prompts=prompts[:used],
            ks={run.name: max(1, run.k) for run in runs},
            differences=differences if alone else None,
            noise=noise if alone else None,
            not_comparable=count_failed(runs) if alone else {},
            categories=categories[:used] if categories else None,
            past={
                run.name: past_positions(arms[run.name], _lengths(run, prompt_tokens))
                for run in runs
            },
            warnings=warnings,
            seed=seed,
        )
        for arm, run in zip(report.arms, runs, strict=True):
            _complete(arm, run, common.get("slo_ms") or {}, seed)
        _add_speeds(report.arms, runs, seed)
        steps.append((load, report))
    first = steps[0][1]
    if len(steps) > 1:
        first.load = [
            {**load.as_json(), "arms": report.arms, "comparisons": report.comparisons}
            for load, report in steps
        ]
    for measured in first.measurements["arms"].values():
        del measured["outputs"]  # the turns have them
    first.measurements = {**_measurements(results, prompts), **first.measurements}
    return first


def as_arm_run(run: LoadRun, arm: Arm, speed: Speed) -> ArmRun:
    """What one arm gave, by round and prompt, as an engine in process would have given it.

    `speed` says which its tokens and seconds are of. A prompt that was asked several times adds up;
    a failed request adds nothing.
    """
    work, k = WORK[speed](run), run.k if counts_by_request(run) else 0
    result = ArmRun(arm, {"method": None if run.plain else "not known"}, speed=speed)
    result.tokens, result.seconds = work[0].tolist(), work[1].tolist()
    for blocks in run.rounds:
        answers = [answer for block in blocks for answer in block.answers]
        rows = [answers[prompt :: run.prompts] for prompt in range(run.prompts)]
        result.outputs.append([row[0].token_ids or [] for row in rows])
        result.counters.append([_counters(row, k) for row in rows])
        result.kept.append([sum(max(a.tokens - 1, 0) for a in row if not a.error) for row in rows])
        result.prefill_seconds.append(
            [float(np.mean([a.ttft for a in row if a.error is None] or [0.0])) for row in rows]
        )
    return result


def _throughput(run: LoadRun) -> tuple[Table, Table]:
    """Tokens and seconds [rounds, prompts] whose sums are all tokens and all wall time.

    The wall time of a block is shared out over its requests by how long each was under way.
    """
    tokens, seconds = np.zeros((2, len(run.rounds), run.prompts))
    for row, blocks in enumerate(run.rounds):
        position = 0
        for block in blocks:
            spans = [answer.e2e if answer.error is None else 0.0 for answer in block.answers]
            for answer, span in zip(block.answers, spans, strict=True):
                tokens[row, position % run.prompts] += answer.tokens if span else 0
                share = block.wall_seconds * span / sum(spans)
                seconds[row, position % run.prompts] += share
                position += 1
    return tokens, seconds


def _decoding(run: LoadRun) -> tuple[Table, Table]:
    """Tokens after the first, and seconds from the first piece to the last [rounds, prompts]."""
    tokens, seconds = np.zeros((2, len(run.rounds), run.prompts))
    for row, blocks in enumerate(run.rounds):
        answers = [answer for block in blocks for answer in block.answers]
        for position, answer in enumerate(answers):
            if answer.error is None:
                tokens[row, position % run.prompts] += answer.tokens - 1
                seconds[row, position % run.prompts] += answer.e2e - answer.ttft
    return tokens, seconds


def _add_speeds(arms: Sequence[Json], runs: Sequence[LoadRun], seed: int) -> None:
    """The speed that the arms' verdicts are not about, and no interval where one block gives none.

    A block's wall time is shared out over its requests, so that one of it says nothing of others;
    nor does anybody know what the machine did meanwhile, which a speedup depends on.
    """
    plain = next((run for run in runs if run.plain), None)
    for speed, work in WORK.items():
        rates = {run.name: _rate(work(run), seed) for run in runs}
        for arm, run in zip(arms, runs, strict=True):
            arm[speed.rate] = figure_json(rates[run.name], run.prompts)
            if plain is not None and arm["speed"] != speed.name:
                samples = ratio(rates[run.name], rates[plain.name])
                arm[speed.speedup] = figure_json(samples, run.prompts)
            if len(run.blocks) == 1:
                for key in (speed.speedup, *([speed.rate] if speed is THROUGHPUT else [])):
                    if arm[key]:
                        arm[key] |= {"low": None, "high": None}


def _rate(work: tuple[Table, Table], seed: int) -> Samples:
    rounds, prompts = work[0].shape
    resampler = Resampler(prompts, rounds, seed=seed)
    return ratio(resampler.sums(work[0]), resampler.sums(work[1]))


WORK = {THROUGHPUT: _throughput, REQUEST: _decoding}


def _counters(answers: Sequence[Answer], k: int) -> SpecCounters | None:
    """A prompt's counters; None where answers bring none (`k` is 0)."""
    if not k:
        return None
    nothing = SpecCounters(0, 0, 0, (0,) * k)
    return sum_counters([answer.counters or nothing for answer in answers])


def counts_by_request(run: LoadRun) -> bool:
    """Did every answer that did not fail bring its own counters?"""
    return run.k > 0 and all(answer.counters is not None for answer in run.good)


def _complete(arm: Json, run: LoadRun, limits: Mapping[str, float], seed: int) -> None:
    """Replace what is measured otherwise than in process, and add what only servers have."""
    arm["latency"] = latency_figures(run.answers)
    arm["goodput"] = goodput_figures(run.blocks, limits) if limits else None
    arm["arrivals"] = None if run.load.rate is None else arrival_figures(run.blocks, run.load.rate)
    pieces = sum(len(answer.chunks) for answer in run.good)
    arm["tokens_per_piece"] = sum(answer.tokens for answer in run.good) / max(1, pieces)
    arm["prefill_ms"] = None  # TTFT has the queue and the network in it
    arm["requests_per_second"] = len(run.good) / sum(block.wall_seconds for block in run.blocks)
    if any(answer.token_ids is None for answer in run.good):
        arm["lossless"] = None
    if any(answer.token_ids is None for answer in run.answers):
        arm["repeatable"] = None
    if run.server.k and not counts_by_request(run):
        _acceptance_by_block(arm, run, seed)
    arm["server_counters"] = _total(run)
    arm["client"] = client_figures(run.blocks)
    arm["warnings"] += warnings_of(run)


def _acceptance_by_block(arm: Json, run: LoadRun, seed: int) -> None:
    """Acceptance from the server's counters alone, whose smallest unit is a block.

    Rounds repeat a block's prompts: together they are one unit, and where a round is one block,
    there is no interval.
    """
    nothing = SpecCounters(0, 0, 0, (0,) * run.k)
    blocks = [
        sum_counters([spent.spec for spent in repeats if spent]) or nothing
        for repeats in zip(*run.counters, strict=True)
    ]
    acceptance = Acceptance.from_counters(blocks, run.k)
    arm |= acceptance_json(acceptance, Resampler(len(blocks), seed=seed))
    spread = accepted_lengths(acceptance)
    arm["accepted_lengths"] = {**spread, "per_request": []} if spread else None


def _total(run: LoadRun) -> Json | None:
    """What the server's counters grew by over all measured blocks; None where nobody counts."""
    if not run.server.counted:
        return None
    spent = sum_counters([counters.spec for counters in run.spent])
    return {
        "requests": sum(counters.requests for counters in run.spent),
        "tokens": sum(counters.tokens for counters in run.spent),
        **(asdict(spent) if spent and run.k else {}),
    }


def first_differences(
    runs: Sequence[LoadRun], prompts: Sequence[str]
) -> dict[str, list[Difference]] | None:
    """By arm, where outputs part from those without speculation; None without token ids.

    Only where both arms answered: half an answer is not another output.
    """
    plain = next((run for run in runs if run.plain), None)
    if plain is None or len(runs) == 1:
        return None
    if any(answer.token_ids is None for run in runs for answer in _firsts(run) if not answer.error):
        return None
    return {
        run.name: [
            found
            for prompt, none, answer in zip(prompts, _firsts(plain), _firsts(run), strict=False)
            if not none.error and not answer.error
            if (found := first_difference(prompt, none.token_ids or [], answer.token_ids or []))
        ]
        for run in runs
        if run is not plain
    }


def count_failed(runs: Sequence[LoadRun]) -> dict[str, int]:
    """By arm, the prompts whose outputs cannot be compared: it or the plain arm did not answer."""
    plain = next((run for run in runs if run.plain), runs[0])
    return {
        run.name: sum(
            bool(none.error or answer.error)
            for none, answer in zip(_firsts(plain), _firsts(run), strict=True)
        )
        for run in runs
    }


def _firsts(run: LoadRun) -> list[Answer]:
    """The first answer to each prompt."""
    return run.answers[: run.prompts]


def _lengths(run: LoadRun, known: Sequence[int | None] | None) -> list[tuple[int, int]]:
    """Tokens of prompt and answer of the first round's requests, where both are known."""
    lengths = []
    answers = [answer for block in run.rounds[0] for answer in block.answers]
    for place, answer in enumerate(answers):
        prompt = (known[place % run.prompts] if known else None) or answer.prompt_tokens
        if prompt is not None and answer.error is None:
            lengths.append((prompt, answer.tokens))
    return lengths


def _measurements(results: Sequence[Sequence[LoadRun]], prompts: Sequence[str]) -> Json:
    loads = [
        {
            **runs[0].load.as_json(),
            "arms": {
                run.name: {
                    "turns": run.blocks,
                    "counters": [spent for row in run.counters for spent in row],
                }
                for run in runs
            },
        }
        for runs in results
    ]
    return {"prompts": list(prompts), "loads": loads}
