"""What one arm's part of report.json says, from what the arm gave: one function a key."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from bench.lossless.greedy import Difference
from bench.records.acceptance import Acceptance
from bench.records.run import ArmRun
from bench.records.speeds import FIGURES as SPEED_FIGURES
from bench.stats.intervals import Quotient
from bench.stats.resample import Resampler, Samples, figure, ratio, resample_acceptance, spread

Json = dict[str, Any]
WITHOUT_CATEGORY = "other"
BASE = "base"


def figure_json(samples: Samples, units: int) -> Json:
    """`{"value", "low", "high"}`; from fewer than two units there is no interval, so null.

    Units are what the samples were drawn over: prompts, or blocks where only those are known.
    """
    found = dict(figure(samples).as_json())
    return found if units > 1 else {**found, "low": None, "high": None}


def acceptance_json(acceptance: Acceptance | None, resampler: Resampler) -> Json:
    """Acceptance length and rate, per position and conditional; all None without speculation."""
    if acceptance is None:
        return dict.fromkeys(
            ("acceptance_length", "acceptance_rate", "per_position", "conditional"), None
        )
    samples, units = resample_acceptance(acceptance, resampler), len(acceptance.drafts_per_prompt)
    return {
        "acceptance_length": figure_json(samples.length, units),
        "acceptance_rate": figure_json(samples.rate, units),
        "per_position": [figure_json(position, units) for position in samples.per_position],
        "conditional": [figure_json(position, units) for position in samples.conditional],
    }


def tokens_per_step_json(found: Quotient | None, resampler: Resampler) -> Json | None:
    """What a step of the target delivered; None without speculation or counters by request."""
    if found is None:
        return None
    over, under = (resampler.sums(table.sum(axis=0)) for table in (found.over, found.under))
    return figure_json(ratio(over, under), found.over.shape[1])


def offline_json(acceptance: Acceptance | None, seed: int) -> Json | None:
    """The offline acceptance length with its interval over the store's blocks."""
    if acceptance is None:
        return None
    units = len(acceptance.drafts_per_prompt)
    return figure_json(resample_acceptance(acceptance, Resampler(units, seed=seed)).length, units)


def general_json(found: Mapping[str, Acceptance], name: str, seed: int) -> Json | None:
    """Acceptance on general prompts, offline, and the share `kept` of the base draft's (None for
    itself and without it), paired by prompt; None for an arm that was not measured there."""
    if name not in found:
        return None
    prompts = len(found[name].drafts_per_prompt)
    counts = Resampler(prompts, seed=seed)
    length = resample_acceptance(found[name], counts).length
    kept = None
    if name != BASE and BASE in found:
        base = resample_acceptance(found[BASE], counts).length
        kept = figure_json(ratio(length, base), prompts)
    return {
        "prompts": prompts,
        "acceptance_length": figure_json(length, prompts),
        "kept": kept,
    }


def accepted_lengths(acceptance: Acceptance | None) -> Json | None:
    """How acceptance is spread, over steps and over requests; None without speculation.

    `per_step` [k + 1]: steps that accepted exactly 0, 1 ... k tokens, over all rounds.
    `per_request` [P]: the acceptance length of each prompt, None where it never drafted.
    """
    if acceptance is None:
        return None
    at_least = np.column_stack([acceptance.drafts_per_prompt, acceptance.accepted_per_prompt])
    totals = np.append(at_least.sum(axis=0), 0)
    per_request = [
        1 + float(row[1:].sum() / row[0]) if row[0] else None  # a prompt without a single draft
        for row in at_least
    ]
    return {"per_step": [int(n) for n in totals[:-1] - totals[1:]], "per_request": per_request}


def latency_json(run: ArmRun, concurrency: int) -> Json | None:
    """Latencies over all requests in ms, where each ran alone; None where several ran at once.

    TTFT is the prefill (no network, no queue), TPOT the decode time per token after the first,
    end-to-end both together. An engine in process shows no single tokens, so there is no ITL.
    """
    if concurrency != 1:
        return None
    ttft = np.array(run.prefill_seconds).ravel()
    decode, tokens = np.array(run.seconds).ravel(), np.array(run.tokens).ravel()
    many = tokens > 0
    return {
        "ttft_ms": spread(1000 * ttft),
        "tpot_ms": spread(1000 * decode[many] / tokens[many]),
        "itl_ms": None,
        "e2e_ms": spread(1000 * (ttft + decode)),
        "requests": len(ttft),
        "failed": 0,
    }


def mean_prefill_ms(run: ArmRun, seed: int) -> Json:
    """Mean prefill time in ms, with its interval over prompts and rounds."""
    seconds = np.array(run.prefill_seconds)
    resampler = Resampler(*seconds.shape[::-1], seed=seed)
    means = ratio(resampler.sums(seconds), resampler.sums(np.ones_like(seconds)))
    return figure_json(1000 * means, seconds.shape[1])


def lossless_json(
    differences: Mapping[str, list[Difference]] | None,
    name: str,
    prompts: int,
    not_comparable: int = 0,
) -> Json | None:
    """How many outputs equal those without speculation, and where the others part from them.

    Of `prompts`, those that are `not_comparable` are left out: later turns of conversations in
    which an earlier answer was another.
    """
    if differences is None:
        return None
    found = differences.get(name, [])
    compared = prompts - not_comparable
    if not compared:
        return None
    return {
        "matching": compared - len(found),
        "prompts": compared,
        "not_comparable": not_comparable,
        "near_ties": sum(difference.near_tie is True for difference in found),
        "examined": sum(difference.near_tie is not None for difference in found),
        "differences": [asdict(difference) for difference in found],
    }


def categories_json(
    runs: Sequence[ArmRun],
    categories: Sequence[str | None] | None,
    ks: Mapping[str, int],
    seed: int,
) -> dict[str, Json | None]:
    """By arm name: every category's figures over its own prompts; None without categories.

    Arms are paired within a category as they are over all prompts. Speed needs a time per prompt,
    so it is None where several requests ran at once. Prompts without a category are `other`.
    """
    if categories is None or not any(categories):
        return {run.arm.name: None for run in runs}
    names = [category or WITHOUT_CATEGORY for category in categories]
    timed = len(runs[0].seconds[0]) == len(names)
    result: dict[str, Json] = {run.arm.name: {} for run in runs}
    for category in dict.fromkeys(names):
        rows = np.flatnonzero([name == category for name in names])
        speeds, plain = speed_samples(runs, seed, rows) if timed else ({}, None)
        counts = Resampler(len(rows), seed=seed)
        for run in runs:
            name = run.arm.name
            acceptance, speed = run.acceptance(ks[name]), speeds.get(name)
            measured: dict[str, Samples | None] = {
                "acceptance_length": None,
                "acceptance_rate": None,
                run.speed.rate: speed,
                run.speed.speedup: None if speed is None or plain is None else ratio(speed, plain),
            }
            if acceptance is not None:
                drafted = resample_acceptance(_select(acceptance, rows), counts)
                measured |= {"acceptance_length": drafted.length, "acceptance_rate": drafted.rate}
            result[name][category] = {
                "prompts": len(rows),
                **dict.fromkeys(SPEED_FIGURES),
            } | {
                key: None if samples is None else figure_json(samples, len(rows))
                for key, samples in measured.items()
            }
    return dict(result)


def speed_samples(
    runs: Sequence[ArmRun], seed: int, rows: np.ndarray | slice = slice(None)
) -> tuple[dict[str, Samples], Samples | None]:
    """Resampled tokens/s over the timing units `rows`, paired: by arm, and without speculation."""
    rounds, units = np.array(runs[0].seconds)[:, rows].shape
    times = Resampler(units, rounds, seed=seed)
    speeds = {
        run.arm.name: ratio(
            times.sums(np.array(run.tokens)[:, rows]), times.sums(np.array(run.seconds)[:, rows])
        )
        for run in runs
    }
    return speeds, next((speeds[run.arm.name] for run in runs if run.arm.draft is None), None)


def _select(acceptance: Acceptance, rows: np.ndarray) -> Acceptance:
    return Acceptance(
        acceptance.drafts_per_prompt[rows],
        acceptance.accepted_per_prompt[rows],
        acceptance.drafted[rows],
    )
