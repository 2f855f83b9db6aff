"""How long a study still takes, from the tasks that are done and from steps that were timed.

A training's time is its steps times what a step of the same arm took (of any arm, where the arm has
none yet); another task's is the mean of its kind.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from afaspec.compare.ledger import Ledger
from afaspec.compare.plan import Plan, Task

if TYPE_CHECKING:
    from afaspec.compare.step_cost import StepCost


def remaining_seconds(
    plan: Plan,
    ledger: Ledger,
    timed: Mapping[str, StepCost] | None = None,
    kinds: Collection[str] = ("data", "base", "run", "eval", "kept", "vllm"),
) -> float | None:
    """Estimated seconds of the tasks of `kinds` not done; None where one's time is unknown.

    `timed` has costs by arm, for arms that have no run yet.
    """
    known: dict[object, list[float]] = defaultdict(list)
    for task in plan.tasks:
        if task.key in ledger:
            for name in _names(task):
                known[name].append(ledger.seconds(task) / _size(task))
    for arm, cost in (timed or {}).items():
        known["run", arm] = known["run", arm] or [cost.seconds]
    total = 0.0
    for task in (t for t in [*plan.pending(ledger), *plan.later] if t.kind in kinds):
        rates = next((known[name] for name in _names(task) if known[name]), None)
        if rates is None:
            if task.kind in ("data", "vllm"):
                return None
            continue  # evaluations are short beside what they wait for
        total += _size(task) * sum(rates) / len(rates)
    return total


def spent_seconds(ledger: Ledger, tasks: Iterable[Task]) -> float:
    """Seconds that the finished ones of `tasks` took."""
    return sum(ledger.seconds(task) for task in tasks if task.key in ledger)


def _names(task: Task) -> list[object]:
    """What its time is looked up by, the closest first."""
    if task.kind != "run" or task.variant is None:
        return [task.kind]
    return [("run", task.variant.arm), "run"]


def _size(task: Task) -> float:
    return float(task.settings["steps"]) if task.kind == "run" else 1.0
