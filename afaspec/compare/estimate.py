"""How long a study still takes, from the cells that are done; and what a step costs before any is.

A training's time is its steps times what a step of the same arm took (of any arm, where the arm has
none yet); another cell's is the mean of its kind.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from afaspec.compare.ledger import Ledger
from afaspec.compare.plan import Cell, Plan
from afaspec.train.config import DEFAULT_LEARNING_RATES, TrainConfig


@dataclass(frozen=True)
class StepCost:
    """Seconds of an optimizer step, and the parameters that it trains."""

    seconds: float
    trainable: int
    total: int


def remaining_seconds(
    plan: Plan,
    ledger: Ledger,
    timed: Mapping[str, StepCost] | None = None,
    kinds: Collection[str] = ("data", "base", "run", "eval", "vllm"),
) -> float | None:
    """Estimated seconds of the cells of `kinds` not done; None where one's time is unknown.

    `timed` has costs by arm, for arms that have no run yet.
    """
    known: dict[object, list[float]] = defaultdict(list)
    for cell in plan.cells:
        if cell.key in ledger:
            for name in _names(cell):
                known[name].append(ledger.seconds(cell) / _size(cell))
    for arm, cost in (timed or {}).items():
        known["run", arm] = known["run", arm] or [cost.seconds]
    total = 0.0
    for cell in (c for c in [*plan.pending(ledger), *plan.later] if c.kind in kinds):
        rates = next((known[name] for name in _names(cell) if known[name]), None)
        if rates is None:
            if cell.kind in ("data", "vllm"):
                return None
            continue  # evaluations are short beside what they wait for
        total += _size(cell) * sum(rates) / len(rates)
    return total


def spent_seconds(ledger: Ledger, cells: Iterable[Cell]) -> float:
    """Seconds that the finished ones of `cells` took."""
    return sum(ledger.seconds(cell) for cell in cells if cell.key in ledger)


def time_step(config: TrainConfig, target: Path, tokens: tuple[int, int]) -> StepCost:
    """Time a step of an arm on random data of `tokens` (prompt, answer).

    The second of two steps is timed: the first compiles and allocates.
    """
    import torch
    from accelerate import Accelerator

    from afaspec.train.arm import make_objective, prepare_arm
    from afaspec.train.objective import Batch
    from drafts.registry import load_draft, read_draft
    from drafts.target import read_target

    device, info = Accelerator().device, read_target(target)
    draft = load_draft(read_draft(config.draft), info)
    _, trained = prepare_arm(draft, config)
    objective = make_objective(draft, info, config).to(device)
    optimizer = torch.optim.AdamW(trained, lr=DEFAULT_LEARNING_RATES[config.arm], fused=True)
    prompt, answer = tokens
    shape, width = (config.batch_size, prompt + answer), info.hidden_size
    layers = draft.feature_size // width if draft.reads == "layers" else 0
    batch = Batch(
        input_ids=torch.randint(draft.vocab_size, shape),
        loss_mask=(torch.arange(prompt + answer) >= prompt).expand(shape).clone(),
        hidden=torch.randn(*shape, layers * width).bfloat16(),
        final=torch.randn(*shape, width).bfloat16(),
    ).to(device)
    seconds = 0.0
    for _ in range(2):
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16"):
            loss = objective(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        float(loss.detach())  # waits for a GPU
        seconds = time.perf_counter() - started
    trainable = sum(p.numel() for p in trained)
    added = 0 if config.arm == "full" else trainable
    return StepCost(
        seconds=seconds * config.accumulation,
        trainable=trainable,
        total=sum(p.numel() for p in draft.parameters()) - added,
    )


def _names(cell: Cell) -> list[object]:
    """What its time is looked up by, the closest first."""
    if cell.kind != "run" or cell.variant is None:
        return [cell.kind]
    return [("run", cell.variant.arm), "run"]


def _size(cell: Cell) -> float:
    return float(cell.settings["steps"]) if cell.kind == "run" else 1.0
