"""Seconds and memory of some work, in fresh processes."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import TypeVar

from rich.table import Table

MIB = 2**20
Shape = TypeVar("Shape")
Prepare = Callable[[str, Shape], Callable[[], object]]


@dataclass(frozen=True)
class Cost:
    """Process seconds, so that other work on the machine changes them little, and the most bytes
    held beyond those held before."""

    seconds: float
    bytes: int


def measured(
    prepare: Prepare[Shape], way: str, small: Shape, shape: Shape, repeats: int, threads: int
) -> Cost:
    """The least of `repeats` costs of `prepare(way, shape)()`, each in a process of its own, which
    a pass of the `small` shape has warmed up. `prepare` is a function of a module."""
    costs = []
    for _ in range(repeats):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            costs.append(pool.submit(_once, prepare, way, small, shape, threads).result())
    return Cost(min(cost.seconds for cost in costs), min(cost.bytes for cost in costs))


def _once(prepare: Prepare[Shape], way: str, small: Shape, shape: Shape, threads: int) -> Cost:
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    prepare(way, small)()
    work, before = prepare(way, shape), _peak_bytes()
    began = time.process_time()
    work()
    return Cost(time.process_time() - began, _peak_bytes() - before)


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def comparison(name: str, rows: Mapping[str, Sequence[Cost]]) -> Table:
    """A table of costs beside those of the plain way, which comes second in each of `rows`."""
    table = Table(name, "ms", "plain", "faster", "MiB", "plain", "less")
    for column in table.columns[1:]:
        column.justify = "right"
    for words, (mine, plain) in rows.items():
        table.add_row(
            words,
            *(f"{1000 * cost.seconds:,.0f}" for cost in (mine, plain)),
            f"{plain.seconds / mine.seconds:.1f}x",
            *(f"{cost.bytes / MIB:,.0f}" for cost in (mine, plain)),
            f"{plain.bytes / max(mine.bytes, 1):.1f}x",
        )
    return table
