"""Turn what the arms gave into a report: figures with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from math import isnan
from typing import Any

from bench.lossless.greedy import Difference, Noise
from bench.records.acceptance import Acceptance
from bench.records.run import ArmRun
from bench.records.speeds import FIGURES as SPEED_FIGURES
from bench.records.speeds import SPEEDUPS
from bench.report.cautions import PastPositions
from bench.report.figures import (
    acceptance_json,
    accepted_lengths,
    categories_json,
    figure_json,
    general_json,
    latency_json,
    lossless_json,
    mean_prefill_ms,
    offline_json,
    speed_samples,
    tokens_per_step_json,
)
from bench.report.schema import Json, Report
from bench.stats.comparisons import comparisons, per_step
from bench.stats.resample import Resampler, ratio
from bench.stats.verdict import ACCEPTANCE, Comparison


def build_report(
    runs: Sequence[ArmRun],
    *,
    common: Json,
    provenance: Mapping[str, Json],
    prompts: Sequence[str],
    ks: Mapping[str, int],
    differences: Mapping[str, list[Difference]] | None,
    noise: Noise | None,
    offline: Mapping[str, Acceptance] = {},
    general: Mapping[str, Acceptance] = {},
    training: Mapping[str, Any] = {},
    categories: Sequence[str | None] | None = None,
    distribution: Mapping[str, Json] = {},
    not_comparable: Mapping[str, int] = {},
    conversations: Sequence[int] | None = None,
    past: Mapping[str, PastPositions | None] = {},
    warnings: Mapping[str, Sequence[str]] = {},
    seed: int = 0,
) -> Report:
    """Turn what the arms gave into figures with intervals.

    Every measured figure is `{"value", "low", "high"}`, or None where the arm has no such measure
    (acceptance without a draft, speedup without a `none` arm, a speed that only servers have).
    `ks` are the speculative tokens per step by arm. `categories` name each prompt's kind, in the
    order of `prompts`; `distribution` holds results of the distribution test by arm;
    `not_comparable` counts the prompts by arm that were not those of the arm without speculation.
    `conversations` numbers the conversation that each of `prompts` is a turn of; `past` says by arm
    what went past the draft's positions, `warnings` what was known of it before the run.
    """
    counts = Resampler(len(prompts), seed=seed)
    accepted = {run.arm.name: run.acceptance(ks[run.arm.name]) for run in runs}
    speeds, plain = speed_samples(runs, seed)
    timed = len(runs[0].seconds[0])
    by_category = categories_json(runs, categories, ks, seed)
    arms = []
    for run in runs:
        name = run.arm.name
        acceptance = accepted[name]
        arm: Json = {"name": name, "label": run.arm.label}
        arm |= acceptance_json(acceptance, counts)
        arm["tokens_per_step"] = tokens_per_step_json(per_step(run), counts)
        arm["accepted_lengths"] = accepted_lengths(acceptance)
        arm["offline_acceptance_length"] = offline_json(offline.get(name), seed)
        arm["general"] = general_json(general, name, seed)
        arm |= {"speed": run.speed.name, **dict.fromkeys(SPEED_FIGURES)}
        arm[run.speed.rate] = figure_json(speeds[name], timed)
        if plain is not None:
            arm[run.speed.speedup] = figure_json(ratio(speeds[name], plain), timed)
        arm["prefill_ms"] = mean_prefill_ms(run, seed)
        arm["latency"] = latency_json(run, common["concurrency"])
        arm["categories"] = by_category[name]
        arm["lossless"] = lossless_json(
            differences, name, len(prompts), not_comparable.get(name, 0)
        )
        arm["distribution"] = distribution.get(name)
        arm["repeatable"] = run.repeatable
        arm["provenance"] = provenance[name]
        beyond = past.get(name)
        arm["past_positions"] = beyond.as_json() if beyond else None
        arm["warnings"] = [*warnings.get(name, [])]
        if beyond:
            arm["warnings"].append(f"{run.arm.label}: {beyond.words}")
        arms.append(arm)
    found = comparisons(runs, int(common.get("block", 1)), conversations)
    _as_compared(arms, found)
    return Report(
        arms=arms,
        provenance=common,
        noise=asdict(noise) if noise else None,
        training=dict(training),
        comparisons=[comparison.as_json() for comparison in found],
        measurements=_measurements(runs, prompts, conversations),
    )


def _as_compared(arms: Sequence[Json], found: Sequence[Comparison]) -> None:
    """Give a figure that is a comparison the comparison's own interval: one number has one."""
    for one in found:
        arm = next(arm for arm in arms if arm["name"] == one.arm)
        if one.metric in SPEEDUPS and arm[one.metric]:
            ends = {"low": 1 + one.relative.low, "high": 1 + one.relative.high}
            arm[one.metric] |= {name: None if isnan(end) else end for name, end in ends.items()}
        elif one.metric == ACCEPTANCE and one.against == "base":
            arm["acceptance_length_gain_over_base"] = one.difference.as_json()


def _measurements(
    runs: Sequence[ArmRun], prompts: Sequence[str], conversations: Sequence[int] | None
) -> Json:
    arms = {}
    for run in runs:
        arms[run.arm.name] = {
            "outputs": run.outputs[0],
            "tokens": run.tokens,
            "seconds": run.seconds,
            "prefill_seconds": run.prefill_seconds,
            "counters": [[None if c is None else asdict(c) for c in row] for row in run.counters],
        }
    numbers = None if conversations is None else [int(number) for number in conversations]
    return {"prompts": list(prompts), "conversations": numbers, "arms": arms}
