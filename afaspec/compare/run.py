"""`afaspec compare`: do the cells of a study one by one, and say what they show.

A cell's result is written when it is done. Killed at any moment, the study goes on with the first
cell that has no result; a training goes on inside the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from afaspec.adapters.annealing import ACTIVATION_NAMES
from afaspec.capture.adapted_target import resolve_target
from afaspec.compare.config import CompareConfig
from afaspec.compare.data import FACTS, Facts, gather
from afaspec.compare.estimate import StepCost, remaining_seconds, time_step
from afaspec.compare.ledger import Ledger
from afaspec.compare.plan import Json, Plan, needed, train_config, variants
from afaspec.compare.study import build_study, read_study, write_study
from afaspec.store.manifest import Manifest, TargetRecord
from afaspec.store.write import locked
from afaspec.train.checks import check_fit, check_steps
from bench.records.progress import Progress
from drafts.errors import UserError
from drafts.registry import read_draft, wanted_layer_ids
from drafts.target import read_target
from serving.compatibility import require_compatible
from serving.runtime import require_vllm

Say = Callable[[str], None]


@dataclass(frozen=True)
class Standing:
    """How far a study is, in cells. `seconds_left` is None where it cannot be told yet."""

    done: int
    total: int
    seconds_left: float | None


def compare(
    config: CompareConfig,
    progress: Progress = lambda what, done, total: None,
    standing: Callable[[Standing], None] = lambda now: None,
    note: Say = lambda text: None,
) -> Json:
    """Do all cells that are not done, and write the study to `config.out`; returns study.json.

    `progress` follows the cell at work, `standing` the whole. Raises `UserError` for bad input
    before any model loads.
    """
    from afaspec.compare.execute import Executor

    target = resolve_target(config.target, config.target_adapter, note)
    facts, prompts = gather(config, target, note)
    check_settings(config, target)
    with locked(config.out, "afaspec compare"):
        facts.write(config.out)
        ledger = Ledger(config.out / "cells")
        executor = Executor(config, target, prompts, ledger, progress)
        plan = current_plan(config, facts, ledger)
        while pending := plan.pending(ledger):
            standing(stand(plan, ledger))
            started = time.perf_counter()
            result = executor.do(pending[0], plan)
            ledger.add(pending[0], result, time.perf_counter() - started)
            if plan.later:  # what it says may decide on a learning rate
                plan = current_plan(config, facts, ledger)
            executor.tidy(plan)
        standing(stand(plan, ledger))
        study = build_study(config, facts, plan, ledger)
        write_study(study, config.out)
    return study


def take_over(config: CompareConfig, stored: Path) -> None:
    """Take the finished cells of a stored study.json(.gz) into the study in `config.out`.

    Raises `UserError` where that was begun with another target or base draft.
    """
    study = read_study(stored)
    facts = Facts(**study["facts"])
    with locked(config.out, "afaspec compare"):
        if (config.out / FACTS).exists():
            facts = facts.joined_to(Facts.read(config.out), stored)
        Ledger(config.out / "cells").adopt(study["cells"])
        facts.write(config.out)


def report_only(config: CompareConfig) -> Json:
    """Write the study again from its stored cells; nothing is run or read beside them."""
    facts = Facts.read(config.out)
    if missing := sorted(config.domains.keys() - facts.domains.keys()):
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


def forecast(config: CompareConfig, note: Say = lambda text: None) -> Forecast:
    """The plan of a study, with one step of every arm and rank timed. Writes nothing."""
    target = resolve_target(config.target, config.target_adapter, note)
    facts, _ = gather(config, target, note)
    check_settings(config, target)
    ledger = Ledger(config.out / "cells")
    plan = current_plan(config, facts, ledger)
    domain = max(config.domains.values(), key=lambda d: d.prompt_tokens + d.max_new_tokens)
    costs: dict[str, StepCost] = {}
    by_arm: dict[str, StepCost] = {}
    for variant in variants(config):
        label = variant.arm if variant.rank is None else f"{variant.arm} r{variant.rank}"
        if label in costs:
            continue
        settings = train_config(config, variant, 1e-4, 0, variant.steps)
        costs[label] = time_step(settings, target, (domain.prompt_tokens, domain.max_new_tokens))
        by_arm[variant.arm] = costs[label]
    return Forecast(
        plan,
        ledger,
        costs,
        remaining_seconds(plan, ledger, by_arm),
        remaining_seconds(plan, ledger, by_arm, ("run",)) or 0.0,
    )


def current_plan(config: CompareConfig, facts: Facts, ledger: Ledger) -> Plan:
    """The plan by the ledger, which forgets what was made with other settings."""
    plan = needed(config, facts, ledger)
    while ledger.drop_stale(plan.cells):
        plan = needed(config, facts, ledger)
    return plan


def stand(plan: Plan, ledger: Ledger) -> Standing:
    total = len(plan.cells) + len(plan.later)
    done = len(plan.cells) - len(plan.pending(ledger))
    return Standing(done, total, remaining_seconds(plan, ledger))


def check_settings(config: CompareConfig, target: Path) -> None:
    """Raise `UserError` where draft, target and the arms' settings do not fit each other."""
    draft, info = read_draft(config.draft), read_target(target)
    require_compatible(info, draft)
    record = TargetRecord(
        path=str(target),
        sha256=info.sha256,
        hidden_size=info.hidden_size,
        vocab_size=info.vocab_size,
        num_layers=info.num_layers,
    )
    store = Manifest(record, wanted_layer_ids(draft, info) or (), dtype="bfloat16", settings={})
    check_fit(store, config.out, draft, info)  # what a captured store will be
    labels = {variant.label(config) for variant in variants(config)}
    for variant in variants(config):
        settings = train_config(config, variant, 1e-4, 0, variant.steps)
        check_steps(draft, max(settings.draft_steps, config.k))
        if settings.activation not in ACTIVATION_NAMES:
            raise UserError(
                f"the arm {variant.arm} has the activation {settings.activation!r}",
                hint=f"choose one of {', '.join(ACTIVATION_NAMES)}",
            )
    if unknown := sorted(set(config.vllm.arms or []) - labels):
        raise UserError(
            f"vllm.arms names {unknown[0]!r}", hint=f"choose from {', '.join(sorted(labels))}"
        )
    if config.measure == "vllm":
        require_vllm()
