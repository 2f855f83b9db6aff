"""Arms with made-up but consistent outputs, times and counts: a report without an engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bench.arms import Arm
from bench.lossless import Difference, Noise
from bench.measure import ArmRun
from bench.report import Report, build_report
from serving.metrics import SpecCounters

PROMPTS, ROUNDS, K, TOKENS = 24, 3, 3, 64
ARMS = {"none": 0.0, "ngram": 0.3, "base": 0.5, "afa-lora": 0.75}  # chance to accept a token
STEP_SECONDS = 0.01


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


def arm_run(name: str, seed: int = 0) -> ArmRun:
    """An arm whose times follow from its drafts, so that truth is known."""
    generator = np.random.default_rng(seed)
    drafts = {"none": None, "ngram": "ngram"}.get(name, Path("drafts") / name)
    run = ArmRun(Arm(name, drafts), {"method": None if name == "none" else "eagle3"})
    spec = [counts(ARMS[name], generator) for _ in range(PROMPTS)]
    for _ in range(ROUNDS):
        run.outputs.append([[1] * (TOKENS + 1)] * PROMPTS)
        run.tokens.append([TOKENS] * PROMPTS)
        run.seconds.append([c.drafts * STEP_SECONDS * generator.normal(1, 0.02) for c in spec])
        run.prefill_seconds.append([0.02] * PROMPTS)
        run.counters.append([None if name == "none" else c for c in spec])
    return run


def report(title: str = "prompts.jsonl", **changes: object) -> Report:
    """A report of all `ARMS`; `changes` replace arguments of `build_report`."""
    common = {
        "target": {"path": "models/target", "sha256": "0" * 64},
        "k": K,
        "temperature": 0.0,
        "max_tokens": TOKENS,
        "rounds": ROUNDS,
        "concurrency": 1,
        "prompts": PROMPTS,
        "prompt_source": title,
        "dtype": "bfloat16",
        "time": "2026-01-01T00:00:00+00:00",
    }
    tie = Difference("prompt 3", 17, 5, 9, 0.01, 0.02, {"none": -1.0, "arm": -1.01}, True)
    runs = [arm_run(name) for name in ARMS]
    arguments = {
        "common": common,
        "provenance": {r.arm.name: {**common, **r.engine, "draft": None} for r in runs},
        "prompts": [f"prompt {i}" for i in range(PROMPTS)],
        "k": K,
        "differences": {"ngram": [], "base": [tie], "afa-lora": []},
        "noise": Noise(1000, 0.001, 0.02, 0.05),
        "offline": {"base": runs[2].acceptance(K)},
        "training": {
            "afa-lora": {"step": [0, 10, 20], "loss": [2.0, 1.5, 1.2]}
            | {"acceptance_length": [1.9, None, 2.5]}
        },
        **changes,
    }
    return build_report(runs, **arguments)
