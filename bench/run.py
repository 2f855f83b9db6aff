"""Measure several arms side by side in vLLM: `run_bench`, from settings to report."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.acceptance import Acceptance
from bench.config import BenchConfig, settings_of
from bench.lossless import Difference, Noise, explain, first_difference
from bench.measure import ArmRun, Progress, measure
from bench.provenance import arm_provenance, common_provenance
from bench.report import Report, build_report
from drafts.target import read_target
from serving.compatibility import require_compatible
from serving.engine import EngineProcess, EngineSettings

if TYPE_CHECKING:
    from bench.prompts import EncodedPrompt


def run_bench(
    config: BenchConfig,
    progress: Progress = lambda stage, done, total: None,
    *,
    prompts: Sequence[EncodedPrompt] | None = None,
    offline: Mapping[str, Acceptance] | None = None,
    training: Mapping[str, Any] | None = None,
    log_folder: Path | None = None,
) -> Report:
    """Measure every arm and return the report; nothing is written but the engines' logs.

    `prompts` replaces reading `config.prompts`. `offline` (acceptance by arm name) and `training`
    (curves by arm name, see `bench.plots.training`) are taken into the report as they are.
    Raises `UserError` before any engine starts if prompts or drafts do not fit.
    """
    read_target(config.target)
    for arm in config.arms:
        if isinstance(arm.draft, Path):
            require_compatible(config.target, arm.draft)
    encoded = list(prompts) if prompts is not None else load_prompts(config)
    inputs = [prompt.input_ids for prompt in encoded]
    names = _distinct([prompt.id for prompt in encoded])
    logs = log_folder or Path(tempfile.mkdtemp(prefix="afaspec-bench-"))
    with ExitStack() as stack:
        engines = _start(config, encoded, logs, stack, progress)
        runs = measure(config, engines, inputs, progress)
        differences, noise = _lossless(
            config, engines, dict(zip(names, encoded, strict=True)), runs, progress
        )
    common = common_provenance(config.target, settings_of(config, inputs))
    return build_report(
        runs,
        common=common,
        provenance={run.arm.name: arm_provenance(run.arm, common, run.engine) for run in runs},
        prompts=names,
        k=config.k,
        differences=differences,
        noise=noise,
        offline=offline or {},
        training=training or {},
        seed=config.seed,
    )


def load_prompts(config: BenchConfig) -> list[EncodedPrompt]:
    """Read and tokenise the prompts of `config`. Raises `UserError` for what cannot be used."""
    from transformers import AutoTokenizer

    from bench.prompts import encode_prompts, read_prompts

    return encode_prompts(
        read_prompts(
            config.prompts,
            limit=config.limit,
            seed=config.seed,
            split=config.split,
            prompt_tokens=config.prompt_tokens,
        ),
        AutoTokenizer.from_pretrained(config.target),
        max_positions=read_target(config.target).max_positions,
        max_prompt_tokens=config.max_prompt_tokens,
        new_tokens=config.max_tokens + config.k + 1,
        truncate=config.truncate_prompts,
    )


def _start(
    config: BenchConfig,
    prompts: Sequence[EncodedPrompt],
    logs: Path,
    stack: ExitStack,
    progress: Progress,
) -> dict[str, EngineProcess]:
    """One engine per arm. They load and compile side by side, each mostly on one core."""
    longest = max(len(prompt.input_ids) for prompt in prompts)
    engines: dict[str, EngineProcess] = {}
    for arm in config.arms:
        settings = EngineSettings(
            target=config.target,
            draft=arm.draft,
            k=config.k,
            temperature=config.temperature,
            seed=config.seed,
            dtype=config.dtype,
            max_model_len=longest + config.max_tokens + config.k + 1,
            enforce_eager=config.enforce_eager,
            batch=config.concurrency,
            cache_gib=config.cache_gib,
            draft_sample_method=config.draft_sample_method,
        )
        engine = EngineProcess(settings, logs / f"engine-{arm.name}.log", wait=False)
        engines[arm.name] = stack.enter_context(engine)
    for done, engine in enumerate(engines.values()):
        progress("starting engines", done, len(engines))
        engine.wait_ready()
    progress("starting engines", len(engines), len(engines))
    return engines


def _lossless(
    config: BenchConfig,
    engines: Mapping[str, EngineProcess],
    prompts: Mapping[str, EncodedPrompt],
    runs: Sequence[ArmRun],
    progress: Progress,
) -> tuple[dict[str, list[Difference]] | None, Noise | None]:
    """First differences from the `none` arm, explained; None when there is nothing to compare."""
    none = next((run for run in runs if run.arm.draft is None), None)
    if none is None or config.temperature > 0:
        return None, None
    plain = dict(zip(prompts, none.outputs[0], strict=True))
    differences = {
        run.arm.name: [
            found
            for prompt, output in zip(prompts, run.outputs[0], strict=True)
            if (found := first_difference(prompt, plain[prompt], output))
        ]
        for run in runs
        if run is not none
    }
    return explain(
        engines[none.arm.name],
        {name: prompt.input_ids for name, prompt in prompts.items()},
        plain,
        differences,
        lambda done, total: progress("explaining differences", done, total),
    )


def _distinct(names: Sequence[str]) -> list[str]:
    """The names, with a number added to those that come again."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return distinct
