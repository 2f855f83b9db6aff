"""`afaspec compare`: do the tasks of a study one by one, and say what they show.

A task's result is written when it is done. Killed at any moment, the study goes on with the first
task that has no result; a training goes on inside the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from afaspec.compare.config import CompareConfig
from afaspec.compare.data import FACTS, Facts, read_study_prompts
from afaspec.compare.estimate import remaining_seconds
from afaspec.compare.ledger import Ledger
from afaspec.compare.plan import Json, Plan, plan_tasks, train_config, variants
from afaspec.compare.step_cost import StepCost, time_step
from afaspec.compare.study import build_study, read_study, write_study
from afaspec.store.manifest import Manifest, TargetRecord
from afaspec.store.write import locked
from afaspec.train.checks import check_fit, check_steps
from bench.records.progress import Progress
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.registry import wanted_layer_ids
from drafts.target.info import TargetInfo
from serving.compatibility import require_compatible
from serving.runtime import require_vllm

Say = Callable[[str], None]


@dataclass(frozen=True)
class StudyProgress:
    """How far a study is, in tasks. `seconds_left` is None where it cannot be told yet."""

    done: int
    total: int
    seconds_left: float | None


def compare(
    config: CompareConfig,
    target: TargetInfo,
    draft: DraftInfo,
    progress: Progress = lambda what, done, total: None,
    study_progress: Callable[[StudyProgress], None] = lambda now: None,
    note: Say = lambda text: None,
) -> Json:
    """Do all tasks that are not done, and write the study to `config.out`; returns study.json.

    `target` and `draft` are what `config` names, opened. `progress` is told of the task at work,
    `study_progress` of the whole. Raises `UserError` for bad input before any model loads.
    """
    from afaspec.compare.execute import Executor

    facts, _ = read_study_prompts(config, target, draft, note)
    check_settings(config, target, draft)
    with locked(config.out, "afaspec compare"):
        facts.write(config.out)
        ledger = Ledger(config.out / "cells")
        executor = Executor(config, target, draft, ledger, progress)
        plan = current_plan(config, facts, ledger)
        while pending := plan.pending(ledger):
            study_progress(progress_of(plan, ledger))
            started = time.perf_counter()
            result = executor.run(pending[0], plan)
            ledger.add(pending[0], result, time.perf_counter() - started)
            if plan.later:  # what it says may decide on a learning rate
                plan = current_plan(config, facts, ledger)
            executor.delete_unneeded(plan)
        study_progress(progress_of(plan, ledger))
        study = build_study(config, facts, plan, ledger)
        write_study(study, config.out)
    return study


def import_study(config: CompareConfig, stored: Path) -> None:
    """Add the finished tasks of a stored study.json(.gz) to the study in `config.out`.

    Raises `UserError` where that was begun with another target or base draft.
    """
    study = read_study(stored)
    facts = Facts(**study["facts"])
    with locked(config.out, "afaspec compare"):
        if (config.out / FACTS).exists():
            facts = facts.joined_to(Facts.read(config.out), stored)
        Ledger(config.out / "cells").add_records(study["cells"])
        facts.write(config.out)


def report_only(config: CompareConfig) -> Json:
    """Write the study again from its stored tasks; nothing is run or read beside them."""
    facts = Facts.read(config.out)
    if missing := sorted(config.sets.keys() - facts.domains.keys()):
        raise UserError(
            f"has no prompts of the domain {missing[0]} yet",
            where=config.out,
            hint="run afaspec compare without --report-only",
        )
    ledger = Ledger(config.out / "cells")
    study = build_study(config, facts, current_plan(config, facts, ledger), ledger)
    write_study(study, config.out)
    return study


@dataclass(frozen=True)
class Forecast:
    """What a dry run says: the plan, what is done of it, and each arm's step by its label.

    `seconds_left` is None where the time of capturing or of vLLM is not known yet.
    """

    plan: Plan
    ledger: Ledger
    costs: dict[str, StepCost]
    seconds_left: float | None
    training_left: float


def forecast(
    config: CompareConfig, target: TargetInfo, draft: DraftInfo, note: Say = lambda text: None
) -> Forecast:
    """The plan of a study, with one step of every arm and rank timed. Writes nothing."""
    facts, _ = read_study_prompts(config, target, draft, note)
    check_settings(config, target, draft)
    ledger = Ledger(config.out / "cells")
    plan = current_plan(config, facts, ledger)
    tokens = max(((d.prompt_tokens, d.max_new_tokens) for d in config.sets.values()), key=sum)
    costs: dict[str, StepCost] = {}
    by_arm: dict[str, StepCost] = {}
    for variant in variants(config):
        label = variant.arm if variant.rank is None else f"{variant.arm} r{variant.rank}"
        if label not in costs:
            settings = train_config(config, variant, 1e-4, 0, variant.steps)
            costs[label] = by_arm[variant.arm] = time_step(settings, draft, target, tokens)
    return Forecast(
        plan,
        ledger,
        costs,
        remaining_seconds(plan, ledger, by_arm),
        remaining_seconds(plan, ledger, by_arm, ("run",)) or 0.0,
    )


def current_plan(config: CompareConfig, facts: Facts, ledger: Ledger) -> Plan:
    """The plan by the ledger, which forgets what was made with other settings."""
    plan = plan_tasks(config, facts, ledger)
    while ledger.drop_stale(plan.tasks):
        plan = plan_tasks(config, facts, ledger)
    return plan


def progress_of(plan: Plan, ledger: Ledger) -> StudyProgress:
    total = len(plan.tasks) + len(plan.later)
    done = len(plan.tasks) - len(plan.pending(ledger))
    return StudyProgress(done, total, remaining_seconds(plan, ledger))


def check_settings(config: CompareConfig, target: TargetInfo, draft: DraftInfo) -> None:
    """Raise `UserError` where draft, target and the arms' settings do not fit each other."""
    require_compatible(target, draft)
    record = TargetRecord(
        path=str(target.folder),
        sha256=target.sha256,
        hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
        num_layers=target.num_layers,
    )
    store = Manifest(record, wanted_layer_ids(draft, target) or (), dtype="bfloat16", settings={})
    check_fit(store, config.out, draft, target)  # what a captured store will be
    labels = set()
    for variant in variants(config):
        labels.add(variant.label(config))
        settings = train_config(config, variant, 1e-4, 0, variant.steps)
        check_steps(draft, max(settings.draft_steps, config.k))
    if unknown := sorted(set(config.vllm.arms or []) - labels):
        raise UserError(
            f"vllm.arms names {unknown[0]!r}", hint=f"choose from {', '.join(sorted(labels))}"
        )
    if config.measure == "vllm":
        require_vllm()
