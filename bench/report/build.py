"""Turn what the arms gave into a report: figures with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from bench.lossless.greedy import Difference, Noise
from bench.records.acceptance import Acceptance
from bench.records.run import ArmRun
from bench.report.figures import (
    acceptance_json,
    accepted_lengths,
    categories_json,
    figure_json,
    latency_json,
    lossless_json,
    mean_prefill_ms,
    offline_json,
)
from bench.report.schema import Json, Report
from bench.stats.comparisons import comparisons
from bench.stats.resample import Resampler, ratio, resample_acceptance


def build_report(
    runs: Sequence[ArmRun],
    *,
    common: Json,
    provenance: Mapping[str, Json],
    prompts: Sequence[str],
    k: int,
    differences: Mapping[str, list[Difference]] | None,
    noise: Noise | None,
    offline: Mapping[str, Acceptance],
    training: Mapping[str, Any],
    categories: Sequence[str | None] | None = None,
    distribution: Mapping[str, Json] | None = None,
    not_comparable: Mapping[str, int] | None = None,
    conversations: Sequence[int] | None = None,
    seed: int = 0,
) -> Report:
    """Turn what the arms gave into figures with intervals.

    Every measured figure is `{"value", "low", "high"}`, or None where the arm has no such measure
    (acceptance without a draft, speedup without a `none` arm). `categories` name each prompt's
    kind, in the order of `prompts`; `distribution` holds results of the distribution test by arm;
    `not_comparable` counts the prompts by arm that were not those of the arm without speculation.
    `conversations` numbers the conversation that each of `prompts` is a turn of.
    """
    rounds, units = np.shape(runs[0].seconds)
    times = Resampler(units, rounds, seed=seed)
    counts = Resampler(len(prompts), seed=seed)
    speeds = {
        run.arm.name: ratio(times.sums(np.array(run.tokens)), times.sums(np.array(run.seconds)))
        for run in runs
    }
    plain = next((speeds[run.arm.name] for run in runs if run.arm.draft is None), None)
    by_category = categories_json(runs, categories, k, seed)
    arms = []
    for run in runs:
        name, acceptance = run.arm.name, run.acceptance(k)
        arm: Json = {"name": name, "label": run.arm.label}
        arm |= acceptance_json(acceptance, counts)
        arm["accepted_lengths"] = accepted_lengths(acceptance)
        arm["offline_acceptance_length"] = offline_json(offline.get(name), seed)
        arm["tokens_per_second"] = figure_json(speeds[name])
        arm["speedup"] = None if plain is None else figure_json(ratio(speeds[name], plain))
        arm["prefill_ms"] = mean_prefill_ms(run, len(prompts), rounds, seed)
        arm["latency"] = latency_json(run, common["concurrency"])
        arm["categories"] = by_category[name]
        arm["lossless"] = lossless_json(
            differences, name, len(prompts), (not_comparable or {}).get(name, 0)
        )
        arm["distribution"] = (distribution or {}).get(name)
        arm["repeatable"] = run.repeatable
        arm["provenance"] = provenance[name]
        arms.append(arm)
    _add_gains(arms, runs, counts, k)
    return Report(
        arms=arms,
        provenance=common,
        noise=asdict(noise) if noise else None,
        training=dict(training),
        comparisons=[
            found.as_json()
            for found in comparisons(runs, _turn_size(common, prompts), conversations)
        ],
        measurements=_measurements(runs, prompts, conversations),
    )


def _turn_size(common: Json, prompts: Sequence[str]) -> int:
    """Prompts that an arm runs in one go: a block, or all of them where a server says nothing."""
    return int(common.get("block", len(prompts) if common.get("mode") == "server" else 1))


def _add_gains(arms: list[Json], runs: Sequence[ArmRun], counts: Resampler, k: int) -> None:
    """What each draft's acceptance length gains over the base draft's, paired by prompt."""
    found = {run.arm.name: run.acceptance(k) for run in runs}
    lengths = {
        name: resample_acceptance(acceptance, counts).length
        for name, acceptance in found.items()
        if acceptance is not None
    }
    base = lengths.pop("base", None)
    for arm in arms:
        if base is not None and arm["name"] in lengths:
            gain = lengths[arm["name"]] - base
            arm["acceptance_length_gain_over_base"] = figure_json(gain)


def _measurements(
    runs: Sequence[ArmRun], prompts: Sequence[str], conversations: Sequence[int] | None
) -> Json:
    arms = {}
    for run in runs:
        arms[run.arm.name] = {
            "outputs": run.outputs[0],
            "decode_tokens": run.tokens,
            "decode_seconds": run.seconds,
            "prefill_seconds": run.prefill_seconds,
            "counters": [[None if c is None else asdict(c) for c in row] for row in run.counters],
        }
    numbers = None if conversations is None else [int(number) for number in conversations]
    return {"prompts": list(prompts), "conversations": numbers, "arms": arms}
