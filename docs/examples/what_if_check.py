"""Does the what-if model predict speedups that it was not fitted on? Measured, then answered.

Measures the embedded target with the embedded draft at k = 1 to 5 and concurrency 1, 2 and 4, and
with further drafts at some of these. The model is fitted to the embedded draft at k = 1 and 3 and
concurrency 1 and 4 alone. It then predicts every other setting: other k, a load between, and the
further drafts, of which it is told the acceptance measured at k = 3 and concurrency 1 but no time.

    python docs/examples/what_if_check.py --out runs/what-if
    python docs/examples/what_if_check.py --out runs/what-if \
        --draft afa-lora=runs/demo/afa-lora-merged

Every measured cell is kept in the folder: a second run goes on where the first one stopped. Times
need a machine that does nothing else.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from afaspec.capture.adapted_target import open_target
from afaspec.cli.console import console, progress
from afaspec.demo.run import cpp_headers
from afaspec.pairs.names import open_draft
from bench.records.arms import Arm, parse_arm
from bench.report.console import stage_bars
from bench.sweep.best_k import speedup
from bench.sweep.cells import CellResult
from bench.sweep.grid import SweepConfig
from bench.sweep.run import run_sweep
from bench.sweep.step_time import fit
from bench.sweep.steps import points, source
from bench.sweep.what_if import check, fit_summary
from drafts.files import write_json

FITTED_K, FITTED_LOADS = (1, 3), (1, 4)
WITHIN = 0.10


def main(
    out: Annotated[Path, typer.Option(help="Folder of cells and result.")] = Path("runs/what-if"),
    draft: Annotated[
        list[str] | None, typer.Option(help="NAME=FOLDER of a further draft; repeatable.")
    ] = None,
    prompts: Annotated[int, typer.Option(help="Prompts, a multiple of 4, 16 at least.")] = 16,
    rounds: Annotated[int, typer.Option(help="How often each prompt runs.")] = 2,
    eager: Annotated[bool, typer.Option(help="Do not compile: starts sooner.")] = False,
) -> None:
    """Measure, fit, predict what was left out, and compare."""

    def measured(arms: list[Arm], ks: tuple[int, ...], loads: tuple[int, ...]) -> list[CellResult]:
        config = SweepConfig(
            target=open_target("embedded"),
            prompts=str(cpp_headers()),
            arms=tuple(arms),
            ks=ks,
            concurrencies=loads,
            max_tokens=(64,),
            rounds=rounds,
            together=5,
            limit=prompts,
            split="eval",
            prompt_tokens=96,
            ignore_eos=True,
            enforce_eager=eager,
        )
        with progress() as bars:
            return run_sweep(config, out, stage_bars(bars))

    base = measured([Arm("base", open_draft("embedded-draft"))], (1, 2, 3, 4, 5), (1, 2, 4))
    further = [parse_arm(text) for text in draft or []]
    others = measured(further, (1, 3, 5), FITTED_LOADS) if further else []
    fitted = [c for c in base if c.k in FITTED_K and c.concurrency in FITTED_LOADS]
    model = fit(*points(fitted))
    rows = [row(model, cell, source(fitted, cell.k)) for cell in base if cell not in fitted]
    for cell in others:
        told = next(c for c in others if (c.arm, c.k, c.concurrency) == (cell.arm, 3, 1))
        rows.append(row(model, cell, told))
    errors = np.abs([found["error"] for found in rows])
    result = {
        "fit": fit_summary(model),
        "within": WITHIN,
        "settings": len(rows),
        "inside": int((errors <= WITHIN).sum()),
        "largest_error": float(errors.max()),
        "median_error": float(np.median(errors)),
        "rows": rows,
    }
    write_json(out / "what_if_check.json", result)
    console.print(markdown(result), markup=False, highlight=False, soft_wrap=True)


def row(model: Any, cell: CellResult, acceptance: CellResult) -> dict[str, Any]:
    """One setting that the model was not fitted on."""
    found, interval = check(model, cell, acceptance), speedup(cell).figure
    return {
        "arm": cell.arm,
        "k": cell.k,
        "concurrency": cell.concurrency,
        **asdict(found),
        "low": interval.low,
        "high": interval.high,
        "error": found.error,
    }


def markdown(result: dict[str, Any]) -> str:
    """The table, and how many predictions lie within the aim."""
    titles = ["draft", "k", "at once", "predicted", "measured", "error", "tokens/step", "step, ms"]
    lines = ["| " + " | ".join(titles) + " |", "|---" * len(titles) + "|"]
    for r in result["rows"]:
        cells = [
            r["arm"],
            str(r["k"]),
            str(r["concurrency"]),
            f"{r['predicted_speedup']:.2f}×",
            f"{r['speedup']:.2f}× ({r['low']:.2f} to {r['high']:.2f})",
            f"{r['error']:+.1%}",
            f"{r['predicted_tokens_per_step']:.2f} / {r['tokens_per_step']:.2f}",
            f"{r['predicted_step_ms']:.1f} / {r['step_ms']:.1f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    said = (
        f"{result['inside']} of {result['settings']} settings that the model was not fitted on are "
        f"predicted to within {result['within']:.0%}; the error is {result['median_error']:.1%} in "
        f"the median and {result['largest_error']:.1%} at most."
    )
    return "\n".join([*lines, "", said])


if __name__ == "__main__":
    typer.run(main)
