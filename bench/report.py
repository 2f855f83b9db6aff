"""The result of a run as JSON, in a schema that later tools rely on."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from bench.acceptance import Acceptance
from bench.lossless import Difference, Noise
from bench.measure import ArmRun
from bench.statistics import Figure, Resampler, Samples, figure, ratio, resample_acceptance
from drafts.errors import UserError
from drafts.files import atomic_file, read_json, write_json

SCHEMA = "afaspec-report/1"

Json = dict[str, Any]


@dataclass
class Report:
    """A finished comparison. `arms` are JSON objects in the order of the run (see `build_report`).

    `measurements` are the raw outputs, times and counts by arm; they go to a file of their own.
    """

    arms: list[Json]
    provenance: Json
    noise: Json | None = None
    training: Json = field(default_factory=dict)
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
            "numerical_noise": self.noise,
            "training": self.training,
            "provenance": self.provenance,
        }


def read_report(path: Path) -> Report:
    """A report from its JSON file. Raises `UserError` for another schema."""
    content = read_json(path)
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"has schema {schema!r}, expected {SCHEMA!r}",
            where=path,
            mend="give a report.json that `afaspec bench` wrote",
        )
    return Report(
        content["arms"], content["provenance"], content["numerical_noise"], content["training"]
    )


def write_report(report: Report, folder: Path) -> Path:
    """Write measurements, plots, page and report.json, each atomically; returns the page's path.

    report.json comes last: where it exists, the rest is there too.
    """
    from bench.page import write_page
    from bench.plots import write_plots

    folder.mkdir(parents=True, exist_ok=True)
    if report.measurements:
        with atomic_file(folder / "measurements.json") as temporary:  # too long for an indent
            temporary.write_text(json.dumps(report.measurements) + "\n", encoding="utf-8")
    write_plots(report, folder)
    page = write_page(report, folder / "report.html")
    write_json(folder / "report.json", report.as_json())
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
    seed: int = 0,
) -> Report:
    """Turn what the arms gave into figures with intervals.

    Every measured figure is `{"value", "low", "high"}`, or None where the arm has no such measure
    (acceptance without a draft, speedup without a `none` arm).
    """
    rounds, units = np.shape(runs[0].seconds)
    times = Resampler(units, rounds, seed=seed)
    counts = Resampler(len(prompts), seed=seed)
    speeds = {
        run.arm.name: ratio(times.sums(np.array(run.tokens)), times.sums(np.array(run.seconds)))
        for run in runs
    }
    plain = next((speeds[run.arm.name] for run in runs if run.arm.draft is None), None)
    lengths: dict[str, Samples] = {}
    arms = []
    for run in runs:
        name = run.arm.name
        arm: Json = {"name": name, "label": run.arm.label}
        arm |= _acceptance(run.acceptance(k), counts, lengths, name)
        arm["offline_acceptance_length"] = _offline(offline.get(name), seed)
        arm["tokens_per_second"] = _json(speeds[name])
        arm["speedup"] = None if plain is None else _json(ratio(speeds[name], plain))
        arm["prefill_ms"] = _json(_mean_prefill(run, len(prompts), rounds, seed))
        arm["lossless"] = _lossless(differences, name, len(prompts))
        arm["repeatable"] = run.repeatable
        arm["provenance"] = provenance[name]
        arms.append(arm)
    if "base" in lengths:
        for arm in arms:
            if arm["name"] in lengths and arm["name"] != "base":
                gain = lengths[arm["name"]] - lengths["base"]
                arm["acceptance_length_gain_over_base"] = _json(gain)
    return Report(
        arms=arms,
        provenance=common,
        noise=asdict(noise) if noise else None,
        training=dict(training),
        measurements=_measurements(runs, prompts),
    )


def _acceptance(
    acceptance: Acceptance | None, resampler: Resampler, lengths: dict[str, Samples], name: str
) -> Json:
    if acceptance is None:
        return dict.fromkeys(
            ("acceptance_length", "acceptance_rate", "per_position", "conditional"), None
        )
    samples = resample_acceptance(acceptance, resampler)
    lengths[name] = samples.length
    return {
        "acceptance_length": _json(samples.length),
        "acceptance_rate": _json(samples.rate),
        "per_position": [_json(position) for position in samples.per_position],
        "conditional": [_json(position) for position in samples.conditional],
    }


def _offline(acceptance: Acceptance | None, seed: int) -> Json | None:
    if acceptance is None:
        return None
    resampler = Resampler(len(acceptance.drafts_per_prompt), seed=seed)
    return _json(resample_acceptance(acceptance, resampler).length)


def _mean_prefill(run: ArmRun, prompts: int, rounds: int, seed: int) -> Samples:
    resampler = Resampler(prompts, rounds, seed=seed)
    seconds = np.array(run.prefill_seconds)
    return 1000 * ratio(resampler.sums(seconds), resampler.sums(np.ones_like(seconds)))


def _lossless(
    differences: Mapping[str, list[Difference]] | None, name: str, prompts: int
) -> Json | None:
    if differences is None:
        return None
    found = differences.get(name, [])
    return {
        "matching": prompts - len(found),
        "prompts": prompts,
        "near_ties": sum(difference.near_tie is True for difference in found),
        "differences": [asdict(difference) for difference in found],
    }


def _measurements(runs: Sequence[ArmRun], prompts: Sequence[str]) -> Json:
    arms = {}
    for run in runs:
        arms[run.arm.name] = {
            "outputs": run.outputs[0],
            "decode_tokens": run.tokens,
            "decode_seconds": run.seconds,
            "prefill_seconds": run.prefill_seconds,
            "counters": [[None if c is None else asdict(c) for c in row] for row in run.counters],
        }
    return {"prompts": list(prompts), "arms": arms}


def _json(samples: Samples) -> Json:
    result: Figure = figure(samples)
    return dict(result.as_json())
