"""Which tasks a study needs, given the results of those that are done.

A task (a cell of the study, as docs and files call it) is one piece of work with one result. Its
key is a hash of all that it depends on: settings, models, prompts and the tasks before it. So a
changed or larger study runs just what is new to it, and nothing old is ever taken for something
else. `plan_tasks` is a function of results alone: planning, resuming, reporting and the dry run are
all the same call.

    data   a domain's two stores and three splits
    base   the base draft on the eval split
    run    one training, and its acceptance length on the validation split
    eval   a trained draft, as merged, on the eval split
    kept   the same on the eval split of the general prompts, where the study has such
    vllm   merged drafts side by side in vLLM, for one domain and seed
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Any, Literal

from pydantic import BaseModel

from afaspec.compare.config import GENERAL, CompareConfig, TuningConfig
from afaspec.compare.data import Facts
from afaspec.train.config import AFA_ONLY, TrainConfig

Json = dict[str, Any]
Kind = Literal["data", "base", "run", "eval", "kept", "vllm"]
Done = Mapping[str, Json]  # results by task key

# Of a run's settings: those that lie outside it, or that leave its result as it is.
NOT_IN_KEY = {"store", "draft", "out", "target", "target_adapter", "eval_fraction"}
NOT_IN_KEY |= {"validation_limit", "checkpoint_every", "tensorboard", "mix"}
DIVISION = "root"  # how prompts are divided into sides: studies of another way are made anew


@dataclass(frozen=True)
class Variant:
    """An arm at one point of the axes. `samples` are training sequences, None for all."""

    arm: str
    rank: int | None
    steps: int
    samples: int | None

    def label(self, config: CompareConfig) -> str:
        """Its name in tables: the arm, and where it stands on axes of more than one value."""
        parts = [self.arm]
        if self.rank is not None and len(config.ranks) > 1 and not has_own_rank(config, self.arm):
            parts.append(f"r{self.rank}")
        if len(config.steps) > 1:
            parts.append(f"{self.steps} steps")
        if len(config.samples) > 1:
            parts.append("all samples" if self.samples is None else f"{self.samples} samples")
        return " ".join(parts)


@dataclass(frozen=True)
class Task:
    """A piece of work. `inputs` decide its key; `settings` are more of the same, spelled out.

    Of `settings`, `inputs` hold what differs from the defaults, so that a setting that afaspec
    gains later makes no old result invalid.
    """

    kind: Kind
    domain: str
    inputs: Json
    name: str
    variant: Variant | None = None
    rate: float | None = None
    seed: int | None = None
    settings: Json = field(default_factory=dict)

    @cached_property
    def key(self) -> str:
        text = json.dumps([self.kind, self.inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass
class Plan:
    """All tasks known so far, in the order of work. `later` stands in for tasks that depend on
    learning rates not chosen yet: their number and size are right, their keys are not."""

    config: CompareConfig
    facts: Facts
    tasks: list[Task] = field(default_factory=list)
    later: list[Task] = field(default_factory=list)
    choices: dict[tuple[str, Variant], Choice] = field(default_factory=dict)
    runs: dict[str, Task] = field(default_factory=dict)  # by key of their eval and kept tasks

    def pending(self, done: Done) -> list[Task]:
        return [task for task in self.tasks if task.key not in done]

    def evals(self, domain: str, variant: Variant, kind: Kind = "eval") -> list[Task]:
        """The final results of a variant, in the order of the seeds; or what they `kept`."""
        return [c for c in self.tasks if (c.kind, c.domain, c.variant) == (kind, domain, variant)]

    def only(self, kind: Kind, domain: str) -> Task:
        """The domain's one task of that kind."""
        return next(c for c in self.tasks if (c.kind, c.domain) == (kind, domain))


def plan_tasks(config: CompareConfig, facts: Facts, done: Done) -> Plan:
    """Every task of the study: all tuning first, then finals seed by seed, then vLLM."""
    plan = Plan(config, facts)
    datas = [data_task(config, facts, domain) for domain in config.domains]
    general = [data_task(config, facts, GENERAL)] if config.general else []
    for data in [*datas, *general]:
        inputs = {"data": data.key, "draft": facts.draft_sha256, "k": config.k}
        plan.tasks += [data, Task("base", data.domain, inputs, f"{data.domain}: base draft")]
    for variant, data in product(variants(config), datas):
        _add_tuning(plan, done, data, variant)
    for seed, variant, data in product(config.seeds, variants(config), datas):
        _add_final(plan, data, variant, seed)
    if config.measure == "vllm":
        for seed, domain in product(config.vllm.seeds or config.seeds[:1], config.domains):
            _add_vllm(plan, domain, seed)
    plan.tasks = list({task.key: task for task in plan.tasks}.values())  # a try may be a final too
    return plan


def variants(config: CompareConfig) -> list[Variant]:
    """Every arm at every point of the axes it has, ranks within arms within budgets."""
    found = [
        Variant(name, _rank(config, name, rank), steps, samples)
        for samples in config.samples
        for steps in config.steps
        for name in config.arms
        for rank in config.ranks
    ]
    return list(dict.fromkeys(found))  # full fine-tuning has no rank: it comes once


def data_task(config: CompareConfig, facts: Facts, domain: str) -> Task:
    inputs = {
        "domain": domain,
        "target": facts.target_sha256,
        "draft": facts.draft_sha256,
        "prompts": facts.domains[domain],
        "division": DIVISION,
        "validation": config.tuning.validation,
    }
    name = f"{domain}: the target's answers"
    return _with_settings(Task("data", domain, inputs, name), config.sets[domain], {"prompts"})


def run_task(plan: Plan, data: Task, variant: Variant, rate: float, seed: int, steps: int) -> Task:
    """One training."""
    train = train_config(plan.config, variant, rate, seed, steps)
    inputs: Json = {
        "data": data.key,
        "draft": plan.facts.draft_sha256,
        "samples": variant.samples,
        "validation_limit": plan.config.tuning.validation_limit,
    }
    if mix := plan.config.arms[variant.arm].mix:
        inputs["mix"] = {"share": mix, "data": plan.only("data", GENERAL).key}
    name = f"{data.domain}: {variant.label(plan.config)}, rate {rate:g}, seed {seed}"
    task = Task("run", data.domain, inputs, name, variant, rate, seed)
    of_adapters = {"rank", "init"} if train.arm == "full" else set()
    return _with_settings(task, train, NOT_IN_KEY | of_adapters)


def _with_settings(task: Task, settings: BaseModel, besides: set[str]) -> Task:
    """The task with `settings` in its key where they differ from the defaults."""
    everything = settings.model_dump(mode="json", exclude=besides)
    changed = settings.model_dump(mode="json", exclude=besides, exclude_defaults=True)
    return replace(task, inputs={**task.inputs, "settings": changed}, settings=everything)


def train_config(
    config: CompareConfig, variant: Variant, rate: float, seed: int, steps: int
) -> TrainConfig:
    """A run's settings, with nowhere to read and write yet.

    Unless the study says otherwise a run is evaluated once, at its end: what counts is where the
    training leads, not the best of many looks at the validation split.
    """
    arm = config.arms[variant.arm]
    values: Json = {"draft_steps": config.k, "eval_every": steps, "checkpoint_every": 100}
    values |= config.train.model_dump(exclude_unset=True)
    values |= arm.model_dump(exclude_unset=True, exclude={"learning_rates", "against", "mix"})
    values |= {"arm": arm.arm, "steps": steps, "learning_rate": rate, "seed": seed}
    if variant.rank is not None:
        values["rank"] = variant.rank
    if arm.arm != "afa-lora":  # settings of all arms may hold some of its own
        values = {name: value for name, value in values.items() if name not in AFA_ONLY}
    values |= {"store": "", "draft": config.draft, "out": "", "tensorboard": False}
    return TrainConfig(**values)


def has_own_rank(config: CompareConfig, arm: str) -> bool:
    return "rank" in config.arms[arm].model_fields_set


def _rank(config: CompareConfig, name: str, rank: int) -> int | None:
    arm = config.arms[name]
    if arm.arm == "full":
        return None
    return arm.rank if has_own_rank(config, name) else rank


def _add_tuning(plan: Plan, done: Done, data: Task, variant: Variant) -> None:
    """Add the tries that are known to be needed, and what they say so far."""
    rule, grid = plan.config.tuning, plan.config.arms[variant.arm].grid()
    steps = min(rule.steps or variant.steps, variant.steps)
    tries: dict[float, float] = {}
    while True:  # each round knows one extension of the grid more than the one before
        choice = choose(grid, tries, rule)
        tasks = {
            rate: run_task(plan, data, variant, rate, rule.seed, steps) for rate in choice.untried
        }
        plan.tasks += tasks.values()
        tries |= {
            rate: done[task.key]["validation_acceptance_length"]
            for rate, task in tasks.items()
            if task.key in done
        }
        if not tasks or tasks.keys() - tries.keys():
            plan.choices[data.domain, variant] = choose(grid, tries, rule)
            return


def _add_final(plan: Plan, data: Task, variant: Variant, seed: int) -> None:
    """Add a final run and its evaluation, or their stand-ins while the rate is not known."""
    config, choice = plan.config, plan.choices[data.domain, variant]
    grid = config.arms[variant.arm].grid()
    rate = choice.rate if choice.rate is not None else grid[len(grid) // 2]
    run = run_task(plan, data, variant, rate, seed, variant.steps)
    name = f"{run.name}: on the eval side"
    inputs = {"run": run.key, "k": config.k}
    finals = [Task("eval", data.domain, inputs, name, variant, rate, seed)]
    if config.general:
        inputs = {**inputs, "data": plan.only("data", GENERAL).key}
        name = f"{run.name}: on general prompts"
        finals.append(Task("kept", data.domain, inputs, name, variant, rate, seed))
    if choice.rate is not None:
        plan.tasks += [run, *finals]
        plan.runs |= {final.key: run for final in finals}
        return
    is_a_try = seed == config.tuning.seed and variant.steps <= (
        config.tuning.steps or variant.steps
    )
    plan.later += finals if is_a_try else [run, *finals]


def _add_vllm(plan: Plan, domain: str, seed: int) -> None:
    """Add the measurement of all wanted variants of one domain and seed."""
    config = plan.config

    def evals(tasks: list[Task]) -> list[str]:
        wanted = config.vllm.arms
        return [
            task.key
            for task in tasks
            if (task.kind, task.domain, task.seed) == ("eval", domain, seed)
            and task.variant
            and (wanted is None or task.variant.label(config) in wanted)
        ]

    inputs = {"evals": evals(plan.tasks), "k": config.k}
    task = Task("vllm", domain, inputs, f"{domain}: vLLM, seed {seed}", seed=seed)
    task = _with_settings(task, config.vllm, {"arms", "seeds"})
    (plan.later if evals(plan.later) else plan.tasks).append(task)


@dataclass(frozen=True)
class Choice:
    """What the tries so far say. `rate` is None while `untried` rates are still to be trained.

    `at_edge` says that the best rate is still at an end of all that was tried.
    """

    rate: float | None
    tries: dict[float, float] = field(default_factory=dict)
    untried: tuple[float, ...] = ()
    at_edge: bool = False


def choose(grid: Sequence[float], tries: Mapping[float, float], rule: TuningConfig) -> Choice:
    """The choice among `grid` (rising) and its extensions.

    `tries` maps rates to acceptance lengths on the validation split; others than the grid's and its
    extensions are left aside.
    """
    rates = list(grid)
    if len(rates) == 1:
        return Choice(rates[0])
    for left in range(rule.extensions, -1, -1):
        known = {rate: tries[rate] for rate in rates if rate in tries}
        if untried := tuple(rate for rate in rates if rate not in tries):
            return Choice(None, known, untried)
        best = best_rate(known, rule.tie)
        beyond = beyond_edge(best, rates)
        if beyond is None or left == 0:
            return Choice(best, known, at_edge=beyond is not None)
        rates = sorted([*rates, beyond])
    raise AssertionError("unreachable")


def best_rate(tries: Mapping[float, float], tie: float) -> float:
    """The smallest rate whose acceptance length is within `tie` of the best."""
    best = max(tries.values())
    return min(rate for rate, length in tries.items() if length >= best * (1 - tie))


def beyond_edge(rate: float, rates: Sequence[float]) -> float | None:
    """The rate next to an end of `rates` (rising) at the grid's own factor; None inside."""
    if rate == rates[0]:
        return _rounded(rate * rate / rates[1])
    if rate == rates[-1]:
        return _rounded(rate * rate / rates[-2])
    return None


def _rounded(rate: float) -> float:
    return float(f"{rate:.3g}")
