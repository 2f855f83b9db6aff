"""The result of a run as JSON, in a schema that later tools rely on (docs/bench.md lists it)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.acceptance import Acceptance
from bench.arm_figures import (
    acceptance_json,
    accepted_lengths,
    categories_json,
    figure_json,
    latency_json,
    lossless_json,
    mean_prefill_ms,
    offline_json,
)
from bench.comparisons import comparisons
from bench.lossless import Difference, Noise
from bench.measure import ArmRun
from bench.statistics import Resampler, ratio, resample_acceptance
from drafts.errors import UserError
from drafts.files import atomic_file, read_json, write_json

SCHEMA = "afaspec-report/2"
OLDER_SCHEMA = "afaspec-report/1"  # lacks the keys below

NEW_IN_2 = ("categories", "accepted_lengths", "latency", "distribution")  # of every arm

Json = dict[str, Any]


@dataclass
class Report:
    """A finished comparison. `arms` are JSON objects in the order of the run (see `build_report`).

    `comparisons` are verdicts between arms, `load` the arms at several loads. `measurements` are
    the raw outputs, times and counts by arm; they go to a file of their own.
    """

    arms: list[Json]
    provenance: Json
    noise: Json | None = None
    training: Json = field(default_factory=dict)
    comparisons: list[Json] = field(default_factory=list)
    load: list[Json] | None = None
    measurements: Json = field(default_factory=dict)

    def arm(self, name: str) -> Json:
        """The arm of that name; KeyError if the run had none."""
        for arm in self.arms:
            if arm["name"] == name:
                return arm
        raise KeyError(name)

    def as_json(self) -> Json:
        """The content of report.json."""
        return {
            "schema": SCHEMA,
            "arms": self.arms,
            "comparisons": self.comparisons,
            "load": self.load,
            "numerical_noise": self.noise,
            "training": self.training,
            "provenance": self.provenance,
        }


def read_report(path: Path) -> Report:
    """A report from its JSON file; one of the older schema reads as one that measured less.

    Raises `UserError` for another schema.
    """
    content = read_json(path)
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema not in (SCHEMA, OLDER_SCHEMA):
        raise UserError(
            f"has schema {schema!r}, expected {SCHEMA!r}",
            where=path,
            mend="give a report.json that `afaspec bench` wrote",
        )
    return Report(
        [{**dict.fromkeys(NEW_IN_2), **arm} for arm in content["arms"]],
        content["provenance"],
        content["numerical_noise"],
        content["training"],
        content.get("comparisons", []),
        content.get("load"),
    )


def write_report(report: Report, folder: Path) -> Path:
    """Write measurements, plots, page, CSV and report.json, each atomically; returns the page.

    report.json comes last: where it exists, the rest is there too.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if report.measurements:
        with atomic_file(folder / "measurements.json") as temporary:  # too long for an indent
            temporary.write_text(json.dumps(report.measurements) + "\n", encoding="utf-8")
    page = render_report(report, folder)
    write_json(folder / "report.json", report.as_json())
    return page


def render_report(report: Report, folder: Path) -> Path:
    """Write what can be made from a report alone: plots, page and CSV; returns the page."""
    from bench.csv_rows import write_csv
    from bench.page import write_page
    from bench.plots import write_plots

    write_plots(report, folder)
    page = write_page(report, folder / "report.html")
    write_csv(report, folder / "report.csv")
    return page


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
