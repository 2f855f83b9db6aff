"""Measure several arms side by side in vLLM: `run_bench`, from settings to report."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.engine.measure import measure, plan_blocks
from bench.lossless.greedy import Difference, Noise, explain, first_difference, with_texts
from bench.lossless.sampled import (
    DistributionTest,
    Sampling,
    draw,
    judge_samples,
    sampling_of,
)
from bench.prompts.conversation import Turns as Conversations
from bench.prompts.conversation import unit_name, units
from bench.prompts.encode import EncodedPrompt
from bench.prompts.load import distinct, later_turns, load_prompts, new_tokens, template_record
from bench.prompts.trained_on import trained_on_warnings
from bench.records.acceptance import Acceptance
from bench.records.arms import Arm
from bench.records.config import BenchConfig
from bench.records.progress import Note, Progress
from bench.records.run import ArmRun
from bench.records.turns import Turns, file_name, open_turns
from bench.report.build import build_report
from bench.report.cautions import IN_TURN, foreseen, past_positions, tell, unequal
from bench.report.example import example
from bench.report.provenance import (
    arm_provenance,
    common_provenance,
    machine,
    settings_of,
    versions,
)
from bench.report.schema import Report, warn
from drafts.checkpoint.info import DraftInfo
from serving.compatibility import require_compatible
from serving.engine.engine import EngineProcess, EngineSettings, Generation
from serving.engine.shared import DraftOf, Engine
from serving.runtime import has_gpu
from serving.speculation import require_drafter
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
    keep: Path | None = None,
    note: Note = lambda text: None,
) -> Report:
    """Measure every arm and return the report; nothing is written but the engines' logs.

    With `keep` every turn is written into that folder as it ends, and those that it has are not
    measured again; `bench.records.turns.forget_turns` removes them when the report is written.

    `prompts` replaces reading `config.prompts`. `offline` (acceptance by arm name, on the same
    prompts), `general` (the same on general ones) and `training` (curves by arm name, see
    `bench.report.plots.training`) are taken into the report as they are.
    `note` is told what was passed over in reading, and what is known before the run and should be,
    which the report has as warnings.
    Raises `UserError` before any engine starts if prompts or drafts do not fit.
    """
    for arm in config.arms:
        require_drafter(config.target, arm.drafter, arm.fields)
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
    if config.engines == "in-turn" and len(config.arms) > 1:
        known = {name: [*said, IN_TURN] for name, said in known.items()}
    tell(note, known)
    kept = _kept_turns(keep, config, inputs, note)
    before = len(kept.ended)
    found = _measure_groups(config, inputs, names, turns, longest, logs, kept, progress)
    runs = found.runs
    differing = unequal({run.arm.label: run.engine for run in runs})
    tell(note, {"": differing})
    if turns:
        for run in runs:
            run.engine = {**run.engine, "cut_prompts": run.cut}
    settings = settings_of(config, inputs, turns=len(order))
    settings |= template_record(config.target, config)
    settings["threads"] = runs[0].engine["threads"]
    common = common_provenance(config.target, settings)
    report = build_report(
        runs,
        common=common,
        provenance={run.arm.name: arm_provenance(run.arm, common, run.engine) for run in runs},
        prompts=names,
        ks={arm.name: arm.k(config.k) for arm in config.arms},
        differences=found.differences,
        distribution={name: one.as_json() for name, one in found.distribution.items()},
        not_comparable=count_not_comparable(runs),
        noise=found.noise,
        offline=offline or {},
        general=general or {},
        training=training or {},
        categories=[encoded[conversation].category for conversation, _ in order],
        conversations=[conversation for conversation, _ in order],
        past={run.arm.name: past_positions(run.arm, run.lengths) for run in runs},
        warnings={name: [*said, *differing] for name, said in known.items()},
        seed=config.seed,
    )
    if before:
        report.provenance["turns_of_an_interrupted_run"] = before
    report.example = example(
        names[0], runs[0].inputs[0], runs[0].outputs[0][0], config.target.folder
    )
    warn(report, trained_on_warnings(config.arms, [prompt.root for prompt in encoded]))
    return report


@dataclass
class Found:
    """What the arms gave, and what their outputs say of each other."""

    runs: list[ArmRun]
    differences: dict[str, list[Difference]] | None = None
    noise: Noise | None = None
    distribution: dict[str, DistributionTest] = field(default_factory=dict)


def _measure_groups(
    config: BenchConfig,
    inputs: list[list[int]],
    names: Sequence[str],
    turns: Conversations | None,
    longest: int,
    logs: Path,
    kept: Turns[Generation],
    progress: Progress,
) -> Found:
    """Start, measure and end the engines of each group; the arms in the order of the run."""
    plan, found = sampling_of(config, inputs), Found([])
    drawn: dict[str, list[list[int]]] = {}
    for group in _groups(config):
        with ExitStack() as stack:
            engines = _start(config, group, longest, logs, stack, progress)
            found.runs += measure(config, group, engines, inputs, progress, turns, kept)
            if plan is not None:
                drawn |= _draw(config, group, engines, plan, progress)
            if any(arm.draft is None for arm in group):  # the last, and the judge of the others
                compared = compare_outputs(config, engines, names, found.runs, progress)
                found.differences, found.noise = compared
                found.distribution = _judge(config, engines, drawn, plan, progress)
    found.runs.sort(key=lambda run: config.arms.index(run.arm))
    return found


def _kept_turns(
    folder: Path | None, config: BenchConfig, inputs: Sequence[list[int]], note: Note
) -> Turns[Generation]:
    """The turns that a run of the same settings, prompts, drafts and machine has ended before."""
    if folder is None:
        return Turns[Generation]()
    arms = {
        arm.name: {
            "draft": arm.draft.sha256 if isinstance(arm.draft, DraftInfo) else arm.draft,
            "fields": dict(arm.fields),
        }
        for arm in config.arms
    }
    settings = {
        **settings_of(config, inputs),
        "target": config.target.sha256,
        "arms": arms,
        "draft_sample_method": config.draft_sample_method,
        "versions": versions(),
        "machine": machine(),
    }
    turns = open_turns(folder / file_name(list(arms)), settings, Generation)
    if turns.ended:
        note(f"{len(turns.ended)} turns were measured before, by {turns.path}")
    return turns


def _groups(config: BenchConfig) -> list[tuple[Arm, ...]]:
    """The arms whose engines run at the same time; the one without a draft is in the last."""
    if config.engines == "together":
        return [config.arms]
    return [(arm,) for arm in sorted(config.arms, key=lambda arm: arm.draft is None)]


def _start(
    config: BenchConfig,
    arms: Sequence[Arm],
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
    for done, arm in enumerate(arms):
        progress("starting engines", done, len(arms))
        if not has_gpu() and (shared := of_one_build(arm, engines)):
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
            speculation=arm.fields,
            sampling_logprobs=config.temperature > 0 and config.samples > 0,
            tensor_parallel=config.tensor_parallel,
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


def of_one_build(arm: Arm, engines: Mapping[str, Engine]) -> EngineProcess | None:
    """The engine that runs with a draft whose place the arm's may take; None without one."""
    draft = arm.draft
    if not isinstance(draft, DraftInfo):
        return None
    return next(
        (
            engine.engine
            for engine in engines.values()
            if isinstance(engine, DraftOf)
            and engine.engine.settings.speculation == arm.fields
            and not build_differences(engine.draft, draft)
        ),
        None,
    )


def _draw(
    config: BenchConfig,
    arms: Sequence[Arm],
    engines: Mapping[str, Engine],
    plan: Sampling,
    progress: Progress,
) -> dict[str, list[list[int]]]:
    """What each arm's engine draws for the test of its distribution, by seeds of its own."""
    return {
        arm.name: draw(
            engines[arm.name],
            plan,
            config.arms.index(arm),
            lambda done, total: progress("testing the distribution", done, total),
        )
        for arm in arms
    }


def _judge(
    config: BenchConfig,
    engines: Mapping[str, Engine],
    drawn: dict[str, list[list[int]]],
    plan: Sampling | None,
    progress: Progress,
) -> dict[str, DistributionTest]:
    """The tests of the drafted arms; none where nothing was drawn."""
    if plan is None:
        return {}
    none = next(arm.name for arm in config.arms if arm.draft is None)
    return judge_samples(
        engines[none],
        drawn[none],
        {name: outputs for name, outputs in drawn.items() if name != none},
        plan,
        lambda done, total: progress("judging the distribution", done, total),
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
