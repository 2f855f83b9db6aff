"""Seconds and memory of some work, on a CPU in fresh processes."""

from __future__ import annotations

import gc
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
    """Process seconds, so that other work on the machine changes them little, or those of a GPU
    that the work runs on, and the most bytes held beyond those held before, there likewise."""

    seconds: float
    bytes: int


def measured(
    prepare: Prepare[Shape], way: str, small: Shape, shape: Shape, repeats: int, threads: int
) -> Cost:
    """The least of `repeats` costs of `prepare(way, shape)()`. `prepare` is a function of a module.

    On a CPU each is taken in a process of its own, which a pass of the `small` shape has warmed up.
    A GPU tells what is held on it, so all is done here, after a first pass.
    """
    import torch

    if torch.cuda.is_available():
        return _on_gpu(prepare(way, shape), repeats)
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
    work = prepare(way, shape)
    before, began = _peak_bytes(), time.process_time()
    work()
    return Cost(time.process_time() - began, _peak_bytes() - before)


def _on_gpu(work: Callable[[], object], repeats: int) -> Cost:
    """Of later passes: kernels are chosen and compiled in the first."""
    import torch

    work()
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, began = torch.cuda.memory_allocated(), time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    held = torch.cuda.max_memory_allocated() - before
    del work
    gc.collect()
    torch.cuda.empty_cache()
    return Cost(min(seconds), held)


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def comparison(name: str, rows: Mapping[str, Sequence[Cost]], other: str = "plain") -> Table:
    """A table of costs beside those of the `other` way, which comes second in each of `rows`."""
    table = Table(name, "ms", other, "faster", "MiB", other, "less")
    for column in table.columns[1:]:
        column.justify = "right"
    for words, (mine, theirs) in rows.items():
        less = f"{theirs.bytes / mine.bytes:.1f}x" if mine.bytes > MIB else ""
        table.add_row(
            words,
            *(f"{1000 * cost.seconds:,.0f}" for cost in (mine, theirs)),
            f"{theirs.seconds / mine.seconds:.1f}x",
            *(f"{cost.bytes / MIB:,.0f}" for cost in (mine, theirs)),
            less,
        )
    return table
