"""What attention of drafted rows costs, in seconds and memory, beside all scores at once.

    python -m bench.kernels.attention
    python -m bench.kernels.attention --lengths 256,1024,4096 --heads 32 --kv-heads 8 --size 128

One forward and backward of a later draft step, float32, on one thread (--threads). Both ways take
turns in one run; seconds are the process's own, so that other work on the machine changes them
little, and memory is the most that a fresh process holds beyond what it held before.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from drafts.files import write_json

MIB = 2**20
WAYS = ("attend", "attend_eager")  # of drafts.nn.attention


@dataclass(frozen=True)
class Shape:
    """A batch of sequences of `length` rows, each with `own` entries of earlier draft steps."""

    batch: int
    length: int
    heads: int
    kv_heads: int
    size: int
    own: int


@dataclass(frozen=True)
class Cost:
    """Process seconds of one forward and backward, the least of all, and bytes at its peak."""

    seconds: float
    bytes: int


def main(
    lengths: Annotated[str, typer.Option(help="Rows of a sequence.")] = "256,512,1024,2048,4096",
    tokens: Annotated[int, typer.Option(help="Rows of a batch, at least one sequence.")] = 2048,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 9,
    kv_heads: Annotated[int, typer.Option(help="Key heads.")] = 3,
    size: Annotated[int, typer.Option(help="Channels of a head.")] = 64,
    own: Annotated[int, typer.Option(help="Earlier draft steps.")] = 2,
    repeats: Annotated[int, typer.Option(help="Times that each is measured.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    out: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
) -> None:
    """Measure and print a table; the defaults are the sizes of a draft of SmolLM2-135M."""
    table = Table("length", *(f"{way}, ms" for way in WAYS), "faster", "MiB", "MiB", "less")
    found = []
    for length in map(int, lengths.split(",")):
        shape = Shape(max(1, tokens // length), length, heads, kv_heads, size, own)
        costs = {way: measured(way, shape, repeats, threads) for way in WAYS}
        found.append({"shape": asdict(shape), **{way: asdict(costs[way]) for way in WAYS}})
        mine, plain = (costs[way] for way in WAYS)
        table.add_row(
            f"{shape.batch} x {length}",
            *(f"{1000 * cost.seconds:,.0f}" for cost in (mine, plain)),
            f"{plain.seconds / mine.seconds:.1f}x",
            *(f"{cost.bytes / MIB:,.0f}" for cost in (mine, plain)),
            f"{plain.bytes / max(mine.bytes, 1):.1f}x",
        )
    Console().print(table)
    if out is not None:
        write_json(out, {"threads": threads, "repeats": repeats, "costs": found})


def measured(way: str, shape: Shape, repeats: int, threads: int) -> Cost:
    """What it costs in processes of its own, the least of `repeats`."""
    costs = []
    for _ in range(repeats):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            costs.append(pool.submit(once, way, shape, threads).result())
    return Cost(min(cost.seconds for cost in costs), min(cost.bytes for cost in costs))


def once(way: str, shape: Shape, threads: int) -> Cost:
    """One forward and backward in this process, after a small one that warms it up."""
    import torch

    from drafts.nn import attention

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    function: Callable[..., Any] = getattr(attention, way)
    pass_(function, Shape(1, 32, shape.heads, shape.kv_heads, shape.size, shape.own))
    before = peak_bytes()
    seconds = pass_(function, shape)
    return Cost(seconds, peak_bytes() - before)


def pass_(function: Callable[..., Any], shape: Shape) -> float:
    """The process seconds of one forward and backward."""
    import torch

    from drafts.nn.attention import Sight

    s = shape

    def made(*sizes: int) -> torch.Tensor:
        return torch.randn(s.batch, *sizes, s.size, requires_grad=True)

    q, keys, values = made(s.heads, s.length, 1), *(made(s.kv_heads, s.length) for _ in range(2))
    own = [made(s.kv_heads, s.length, s.own) for _ in range(2)]
    began = time.process_time()
    function(q, keys, values, *own, Sight(offset=s.own)).sum().backward()
    return time.process_time() - began


def peak_bytes() -> int:
    """The most memory that this process has held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    typer.run(main)
