"""What attention of drafted rows costs, in seconds and memory, beside all scores at once.

    python -m bench.kernels.attention
    python -m bench.kernels.attention --lengths 256,1024,4096 --heads 32 --kv-heads 8 --size 128

One forward and backward of a later draft step, both ways in turn, in float32 or on a GPU in bf16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from bench.kernels.cost import comparison, measured
from drafts.files import write_json

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


def main(
    lengths: Annotated[str, typer.Option(help="Rows of a sequence.")] = "256,512,1024,2048,4096",
    rows: Annotated[int, typer.Option(help="Rows of a batch, at least one sequence.")] = 2048,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 9,
    kv_heads: Annotated[int, typer.Option(help="Key heads.")] = 3,
    size: Annotated[int, typer.Option(help="Channels of a head.")] = 64,
    own: Annotated[int, typer.Option(help="Earlier draft steps.")] = 2,
    repeats: Annotated[int, typer.Option(help="Times that each is measured.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    out: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
) -> None:
    """Measure and print a table; the defaults are the sizes of a draft of SmolLM2-135M."""
    found, small = {}, Shape(1, 32, heads, kv_heads, size, own)
    for length in map(int, lengths.split(",")):
        shape = Shape(max(1, rows // length), length, heads, kv_heads, size, own)
        words = f"{shape.batch} x {length}"
        found[words] = [measured(prepare, way, small, shape, repeats, threads) for way in WAYS]
    Console().print(comparison("rows", found))
    if out is not None:
        costs = {
            words: dict(zip(WAYS, map(asdict, pair), strict=True)) for words, pair in found.items()
        }
        write_json(out, {"shape": asdict(small), "threads": threads, "costs": costs})


def prepare(way: str, shape: Shape) -> Callable[[], object]:
    """One forward and backward, ready to run."""
    import torch

    from drafts.nn import attention
    from drafts.nn.packing import Packing

    if torch.cuda.is_available():
        torch.set_default_device("cuda")
        torch.set_default_dtype(torch.bfloat16)
    s, function, n = shape, getattr(attention, way), shape.batch * shape.length

    def made(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, s.size, requires_grad=True)

    q, keys, values = made(s.heads, n, 1), *(made(s.kv_heads, n) for _ in range(2))
    own = [made(s.kv_heads, n, s.own) for _ in range(2)]
    sight = attention.Sight(Packing.of([s.length] * s.batch), offset=s.own)
    return lambda: function(q, keys, values, *own, sight).sum().backward()


if __name__ == "__main__":
    typer.run(main)
