"""Arms with made-up but consistent outputs, times and counts: a report without an engine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bench.lossless.greedy import Difference, Noise
from bench.records.arms import Arm
from bench.records.run import ArmRun
from bench.records.speeds import DECODE, FIGURES, REQUEST, THROUGHPUT, Speed, speed_of
from bench.report.build import build_report
from bench.report.schema import Report
from serving.metrics import SpecCounters
from tests.opened import no_draft_at

PROMPTS, ROUNDS, K, TOKENS = 24, 3, 3, 64
ARMS = {"none": 0.0, "ngram": 0.3, "base": 0.5, "afa-lora": 0.75}  # chance to accept a token
STEP_SECONDS = 0.01
KINDS = ("code", "math", "chat")
CATEGORIES = [KINDS[i % 3] for i in range(PROMPTS)]


def counts(chance: float, generator: np.random.Generator) -> SpecCounters:
    """Draft until TOKENS are out, each token accepted with `chance` while those before it were."""
    drafts, per_position, left = 0, [0] * K, TOKENS
    while left > 0:
        accepted = 0
        while accepted < K and generator.random() < chance:
            per_position[accepted] += 1
            accepted += 1
        drafts, left = drafts + 1, left - accepted - 1
    return SpecCounters(drafts, drafts * K, sum(per_position), tuple(per_position))


def arm_run(name: str, seed: int = 0, chance: float | None = None) -> ArmRun:
    """An arm whose times follow from its drafts, so that truth is known."""
    generator = np.random.default_rng(seed)
    drafts = {"none": None, "ngram": "ngram"}.get(name, no_draft_at(Path("drafts") / name))
    run = ArmRun(Arm(name, drafts), {"method": None if name == "none" else "eagle3"})
    chance = ARMS[name] if chance is None else chance
    spec = [counts(chance, generator) for _ in range(PROMPTS)]
    for _ in range(ROUNDS):
        run.outputs.append([[1] * (TOKENS + 1)] * PROMPTS)
        run.tokens.append([TOKENS] * PROMPTS)
        run.kept.append([TOKENS] * PROMPTS)
        run.seconds.append([c.drafts * STEP_SECONDS * generator.normal(1, 0.02) for c in spec])
        run.prefill_seconds.append([0.02] * PROMPTS)
        run.counters.append([None if name == "none" else c for c in spec])
    return run


def settings(title: str = "prompts.jsonl") -> dict[str, Any]:
    """The provenance that all arms share."""
    return {
        "target": {"path": "models/target", "sha256": "0" * 64},
        "k": K,
        "temperature": 0.0,
        "max_tokens": TOKENS,
        "rounds": ROUNDS,
        "concurrency": 1,
        "block": 4,
        "prompts": PROMPTS,
        "prompts_sha256": "1" * 64,
        "prompt_source": title,
        "dtype": "bfloat16",
        "ignore_eos": False,
        "versions": {"vllm": "0.32.0", "torch": "2.13.0"},
        "machine": {"processor": "a processor", "cores": 2},
        "time": "2026-01-01T00:00:00+00:00",
    }


def report(
    title: str = "prompts.jsonl",
    *,
    seed: int = 0,
    chances: Mapping[str, float] | None = None,
    set_otherwise: Mapping[str, Any] | None = None,
    **changes: object,
) -> Report:
    """A report of the arms in `chances` (default `ARMS`).

    `set_otherwise` changes settings, `changes` replace arguments of `build_report`.
    """
    common = {**settings(title), **(set_otherwise or {})}
    tie = Difference("prompt 3", 17, 5, 9, 0.01, 0.02, {"none": -1.0, "arm": -1.01}, True)
    runs = [arm_run(name, seed, chance) for name, chance in (chances or ARMS).items()]
    base = next((run for run in runs if run.arm.name == "base"), None)
    arguments = {
        "common": common,
        "provenance": {r.arm.name: {**common, **r.engine, "draft": None} for r in runs},
        "prompts": [f"prompt {i}" for i in range(PROMPTS)],
        "ks": {run.arm.name: K for run in runs},
        "differences": {"ngram": [], "base": [tie], "afa-lora": []},
        "noise": Noise(1000, 0.001, 0.02, 0.05, 0.04),
        "offline": {"base": base.acceptance(K)} if base else {},
        "training": {
            "afa-lora": {"step": [0, 10, 20], "loss": [2.0, 1.5, 1.2]}
            | {"acceptance_length": [1.9, None, 2.5]}
        },
        **changes,
    }
    return build_report(runs, **arguments)


def report_of_everything() -> Report:
    """A report with every section that a page can have."""
    made = report(categories=CATEGORIES)
    for arm in made.arms:
        if arm["name"] not in ("none", "ngram"):
            arm["distribution"] = {
                "p_value": 0.41, "control_p_value": 0.7, "passed": True, "power": 0.99,
                "detects": 0.03, "samples": 512, "tokens": 2048, "prompts": 4, "positions": 4,
                "alpha": 0.01, "words": "No deviation of 0.03 or more was found.",
            }  # fmt: skip
    made.load = [{"concurrency": n, "arms": [_loaded(arm, n) for arm in made.arms]} for n in LOADS]
    made.arm("base")["warnings"] = ["base at concurrency 8: 1 of 96 requests failed"]
    return made


LOADS = (1, 2, 4, 8)


def _loaded(arm: dict[str, Any], load: int) -> dict[str, Any]:
    """The arm as it might be at that load: faster in all, slower for each."""

    def scaled(figure: dict[str, float | None], factor: float) -> dict[str, float | None]:
        return {key: value and value * factor for key, value in figure.items()}

    latency = {
        name: scaled(spread, load**0.5) if isinstance(spread, dict) else spread
        for name, spread in arm["latency"].items()
    }
    latency["itl_ms"] = scaled(arm["latency"]["tpot_ms"], 1.5 * load**0.5)
    gain = load ** (0.7 if arm["provenance"]["method"] is None else 0.5)
    return {
        **arm,
        DECODE.rate: scaled(arm[DECODE.rate], gain),
        "latency": latency,
        "categories": None,
    }


def as_before(report: Report, schema: str) -> dict[str, Any]:
    """The report as this package wrote it when one key stood for three speeds (or before that)."""
    content = json.loads(json.dumps(report.as_json()))
    content["schema"] = schema
    steps = [content, *(content["load"] or [])]
    for step in steps:
        kinds = {speed_of(arm) for arm in step["arms"]}
        assert len(kinds) == 1
        for found in step["comparisons"]:
            found["metric"] = re.sub(r"^(decode|throughput|request)_", "", found["metric"])
        for arm in step["arms"]:
            _name_as_before(arm, kinds.copy().pop())
    if schema == "afaspec-report/1":
        del content["comparisons"], content["load"]
        for arm in content["arms"]:
            for key in ("categories", "accepted_lengths", "latency", "distribution"):
                del arm[key]
            del arm["lossless"]["not_comparable"]
    return content


def _name_as_before(arm: dict[str, Any], speed: Speed) -> None:
    del arm["speed"]
    figures = {key: arm.pop(key) for key in FIGURES}
    arm["speedup"] = figures[speed.speedup]
    arm["tokens_per_second"] = figures[(DECODE if speed is DECODE else THROUGHPUT).rate]
    if speed is not DECODE:
        arm["tokens_per_second_per_request"] = figures[REQUEST.rate]
    for part in (arm["categories"] or {}).values():
        figures = {key: part.pop(key) for key in FIGURES}
        part |= {"tokens_per_second": figures[speed.rate], "speedup": figures[speed.speedup]}
