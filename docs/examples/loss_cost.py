"""What a training loss costs, fused with both output layers, beside all logits at once.

    python docs/examples/loss_cost.py
    python docs/examples/loss_cost.py --vocabularies 8192,49152,128256 --width 4096 --rows 512

Loss and gradients of all draft steps, both ways in turn, in float32 or on a GPU in bf16; the
draft's output layer is trained, or frozen with --frozen, as for adapters.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from afaspec.train.losses import DraftedRows, compiled_loss, fused_loss
from afaspec.train.objective import rows_at_once
from bench.kernels.cost import comparison, measured
from drafts.files import write_json

WAYS = ("fused", "eager")


@dataclass(frozen=True)
class Shape:
    """Rows with `steps` draft steps each, and output layers [vocabulary, width]."""

    rows: int
    width: int
    vocabulary: int
    steps: int
    loss: str
    trained: bool


def main(
    vocabularies: Annotated[str, typer.Option(help="Sizes of the draft's.")] = "8192,32000,128256",
    rows: Annotated[int, typer.Option(help="Response tokens of a batch.")] = 1024,
    width: Annotated[int, typer.Option(help="Of the hidden states.")] = 576,
    steps: Annotated[int, typer.Option(help="Draft steps.")] = 3,
    losses: Annotated[str, typer.Option(help="Names, as for afaspec train --loss.")] = "kl",
    frozen: Annotated[bool, typer.Option("--frozen", help="No gradient of the layer.")] = False,
    repeats: Annotated[int, typer.Option(help="Times that each is measured.")] = 3,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    out: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
) -> None:
    """Measure and print a table; the defaults are the width of SmolLM2-135M."""
    found = {}
    for loss in losses.split(","):
        for vocabulary in map(int, vocabularies.split(",")):
            shape = Shape(rows, width, vocabulary, steps, loss, not frozen)
            small = Shape(8, width, 64, steps, loss, not frozen)
            costs = [measured(prepare, way, small, shape, repeats, threads) for way in WAYS]
            found[f"{loss}, {vocabulary:,}"] = costs
    Console().print(comparison("vocabulary", found))
    if out is not None:
        costs_of = {
            words: dict(zip(WAYS, map(asdict, pair), strict=True)) for words, pair in found.items()
        }
        write_json(out, {"rows": rows, "width": width, "steps": steps, "costs": costs_of})


def prepare(way: str, shape: Shape) -> Callable[[], object]:
    """Loss and gradients, ready to run; compiled, if it can be."""
    import torch

    s = shape
    if torch.cuda.is_available():
        torch.set_default_device("cuda")
        torch.set_default_dtype(torch.bfloat16)
    head, teacher = (torch.nn.Linear(s.width, s.vocabulary, bias=False) for _ in range(2))
    head.requires_grad_(s.trained)
    final, numbers = torch.randn(s.rows, s.width), torch.arange(s.rows)
    drafted = [
        DraftedRows(torch.randn(s.rows, s.width, requires_grad=True), numbers, head, 1.0)
        for _ in range(s.steps)
    ]
    chunk = rows_at_once(s.vocabulary, final.device)

    def fused() -> None:
        fused_loss(s.loss, teacher, final, drafted, [head.weight], chunk=chunk).backward()

    def eager() -> None:
        with torch.no_grad():
            logits = teacher(final)
        row_loss, total = compiled_loss(s.loss), torch.zeros(())
        for step in drafted:
            total = total + row_loss(head(step.outputs), logits).sum()
        total.backward()

    return {"fused": fused, "eager": eager}[way]


if __name__ == "__main__":
    typer.run(main)
