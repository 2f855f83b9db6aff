"""Measure several arms side by side in vLLM: `run_bench`, from settings to report."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.engine.measure import measure, plan_blocks
from bench.lossless.greedy import Difference, Noise, explain, first_difference, with_texts
from bench.lossless.sampled import compare_samples
from bench.prompts.conversation import unit_name, units
from bench.prompts.encode import EncodedPrompt
from bench.prompts.load import distinct, later_turns, load_prompts, new_tokens, template_record
from bench.prompts.trained_on import trained_on_warnings
from bench.records.acceptance import Acceptance
from bench.records.config import BenchConfig
from bench.records.progress import Note, Progress
from bench.records.run import ArmRun
from bench.report.build import build_report
from bench.report.cautions import foreseen, past_positions, tell
from bench.report.example import example
from bench.report.provenance import arm_provenance, common_provenance, settings_of
from bench.report.schema import Report, warn
from drafts.checkpoint.info import DraftInfo
from serving.compatibility import require_compatible
from serving.engine.engine import EngineProcess, EngineSettings
from serving.engine.shared import DraftOf, Engine
from serving.runtime import has_gpu
from serving.swap.fits import differences as build_differences


def run_bench(
    config: BenchConfig,
    progress: Progress = lambda stage, done, total: None,
    *,
    prompts: Sequence[EncodedPrompt] | None = None,
    offline: Mapping[str, Acceptance] | None = None,
    general: Mapping[str, Acceptance] | None = None,
    training: Mapping[str, Any] | None = None,
    log_folder: Path | None = None,
    note: Note = lambda text: None,
) -> Report:
    """Measure every arm and return the report; nothing is written but the engines' logs.

    `prompts` replaces reading `config.prompts`. `offline` (acceptance by arm name, on the same
    prompts), `general` (the same on general ones) and `training` (curves by arm name, see
    `bench.report.plots.training`) are taken into the report as they are.
    `note` is told what was passed over in reading, and what is known before the run and should be,
    which the report has as warnings.
    Raises `UserError` before any engine starts if prompts or drafts do not fit.
    """
    for arm in config.arms:
        if isinstance(arm.draft, DraftInfo):
            require_compatible(config.target, arm.draft)
    encoded = list(prompts) if prompts is not None else load_prompts(config, note)
    inputs = [prompt.input_ids for prompt in encoded]
    turns = later_turns(config, encoded)
    order = list(units(plan_blocks(config, len(encoded), turns)))
    ids = distinct([prompt.id for prompt in encoded])
    names = [unit_name(ids[conversation], turn) for conversation, turn in order]
    logs = log_folder or Path(tempfile.mkdtemp(prefix="afaspec-bench-"))
    longest = turns.longest if turns else max(map(len, inputs))
    known = {
        arm.name: foreseen(arm, config.target, longest, config.max_tokens) for arm in config.arms
    }
    tell(note, known)
    with ExitStack() as stack:
        engines = _start(config, longest, logs, stack, progress)
        runs = measure(config, engines, inputs, progress, turns)
        differences, noise = compare_outputs(config, engines, names, runs, progress)
        distribution = compare_samples(config, engines, inputs, progress)
    if turns:
        for run in runs:
            run.engine = {**run.engine, "cut_prompts": run.cut}
    settings = settings_of(config, inputs, turns=len(order))
    settings |= template_record(config.target, config)
    settings["threads"] = runs[0].engine.get("threads")  # all engines have the same environment
    common = common_provenance(config.target, settings)
    report = build_report(
        runs,
        common=common,
        provenance={run.arm.name: arm_provenance(run.arm, common, run.engine) for run in runs},
        prompts=names,
        k=config.k,
        differences=differences,
        distribution={name: found.as_json() for name, found in distribution.items()},
        not_comparable=count_not_comparable(runs),
        noise=noise,
        offline=offline or {},
        general=general or {},
        training=training or {},
        categories=[encoded[conversation].category for conversation, _ in order],
        conversations=[conversation for conversation, _ in order],
        past={run.arm.name: past_positions(run.arm, run.lengths) for run in runs},
        warnings=known,
        seed=config.seed,
    )
    report.example = example(
        names[0], runs[0].inputs[0], runs[0].outputs[0][0], config.target.folder
    )
    warn(report, trained_on_warnings(config.arms, [prompt.root for prompt in encoded]))
    return report


def _start(
    config: BenchConfig,
    longest: int,
    logs: Path,
    stack: ExitStack,
    progress: Progress,
) -> dict[str, Engine]:
    """An engine for each arm, but one for all drafts of one build on a CPU.

    They load and compile side by side, but on a CPU, where each takes all cores, one after another;
    then what one has compiled serves those after it.
    """
    engines: dict[str, Engine] = {}
    for done, arm in enumerate(config.arms):
        progress("starting engines", done, len(config.arms))
        if not has_gpu() and (shared := of_one_build(arm.draft, engines)):
            assert isinstance(arm.draft, DraftInfo)
            engines[arm.name] = DraftOf(shared, arm.draft)
            continue
        settings = EngineSettings(
            target=config.target,
            draft=arm.drafter,
            k=config.k,
            temperature=config.temperature,
            seed=config.seed,
            dtype=config.dtype,
            max_model_len=longest + new_tokens(config),
            enforce_eager=config.enforce_eager,
            batch=config.concurrency,
            cache_gib=config.cache_gib,
            draft_sample_method=config.draft_sample_method,
            sampling_logprobs=config.temperature > 0 and config.samples > 0,
        )
        engine = EngineProcess(settings, logs / f"engine-{arm.name}.log", wait=not has_gpu())
        stack.enter_context(engine)
        engines[arm.name] = engine
        if isinstance(arm.draft, DraftInfo) and not has_gpu():
            engines[arm.name] = DraftOf(engine, arm.draft)
    for started in engines.values():
        started.wait_ready()
    progress("starting engines", len(engines), len(engines))
    return engines


def of_one_build(
    draft: DraftInfo | str | None, engines: Mapping[str, Engine]
) -> EngineProcess | None:
    """The engine that runs with a draft whose place `draft` may take; None without one."""
    if not isinstance(draft, DraftInfo):
        return None
    return next(
        (
            engine.engine
            for engine in engines.values()
            if isinstance(engine, DraftOf) and not build_differences(engine.draft, draft)
        ),
        None,
    )


def compare_outputs(
    config: BenchConfig,
    engines: Mapping[str, Engine],
    names: Sequence[str],
    runs: Sequence[ArmRun],
    progress: Progress,
) -> tuple[dict[str, list[Difference]] | None, Noise | None]:
    """First differences from the `none` arm, explained; None when there is nothing to compare.

    Only prompts that both arms had are compared: later turns may have had other answers before.
    """
    none = next((run for run in runs if run.arm.draft is None), None)
    if none is None or config.temperature > 0:
        return None, None
    prompts = dict(zip(names, none.inputs, strict=True))
    plain = {name: list(ids) for name, ids in zip(names, none.outputs[0], strict=True)}
    differences = {
        run.arm.name: [
            found
            for name, given, output in zip(names, run.inputs, run.outputs[0], strict=True)
            if given == prompts[name] and (found := first_difference(name, plain[name], output))
        ]
        for run in runs
        if run is not none
    }
    explained, noise = explain(
        engines[none.arm.name],
        prompts,
        plain,
        differences,
        lambda done, total: progress("explaining differences", done, total),
    )
    return with_texts(explained, config.target.folder), noise


def count_not_comparable(runs: Sequence[ArmRun]) -> dict[str, int]:
    """Per arm the prompts that were not those of the `none` arm; 0 without such an arm."""
    none = next((run for run in runs if run.arm.draft is None), runs[0])
    return {
        run.arm.name: sum(a != b for a, b in zip(none.inputs, run.inputs, strict=True))
        for run in runs
    }
