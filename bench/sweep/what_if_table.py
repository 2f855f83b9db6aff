"""A what-if's answers on the console, and the choice of the cells that they come from."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from bench.sweep.cells import CellResult
from bench.sweep.what_if import WhatIf, fit_summary
from drafts.errors import UserError

OPTIONS = {
    "temperature": "--temperature",
    "max_tokens": "--max-tokens",
    "sample_method": "--draft-sample-method",
}


def choose_cells(
    cells: Sequence[CellResult],
    temperature: float | None = None,
    max_tokens: int | None = None,
    sample_method: str | None = None,
) -> list[CellResult]:
    """The cells of one temperature, length and way to sample, which share one cost of a step.

    Raises `UserError` where the sweep has none of that kind, or several and none is chosen.
    N-gram cells, which do not sample, go with any.
    """
    chosen = list(cells)
    for (name, option), value in zip(
        OPTIONS.items(), (temperature, max_tokens, sample_method), strict=True
    ):
        there = sorted({getattr(c, name) for c in chosen if getattr(c, name) is not None})
        one_of = f"give {option} with one of {', '.join(map(str, there))}"
        if value is not None and value not in there:
            raise UserError(f"the sweep has no cells with {option} {value}", hint=one_of)
        if value is None and len(there) > 1:
            raise UserError(f"the sweep has cells with several values of {option}", hint=one_of)
        keep = value if value is not None else next(iter(there), None)
        chosen = [c for c in chosen if getattr(c, name) in (None, keep)]
    return chosen


def render(found: WhatIf) -> Table:
    """A row per prediction; the best k of each draft and concurrency is bold.

    `load` is the requests at once; target and draft are their parts of a step, `none` is a step
    without a draft; `break even` is the tokens per step at which the speedup is 1.
    """
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False, collapse_padding=True)
    measured = any(p.measured is not None for p in found.predictions)
    columns = ["draft", "load", "k", "tokens\n/step", "target\nms", "draft\nms", "none\nms"]
    columns += ["break\neven", "speedup", *(["measured"] if measured else [])]
    for column in columns:
        table.add_column(column, justify="left" if column == "draft" else "right")
    best = {id(p) for p in found.best()}
    for p in found.predictions:
        speedup = f"{p.speedup:.2f}×" + ("*" if p.beyond else "")
        if p.low is not None and p.high is not None:
            speedup += f"\n{p.low:.2f}–{p.high:.2f}"
        seen = [] if not measured else ["" if p.measured is None else f"{p.measured:.2f}×"]
        row = [p.label, str(p.concurrency), str(p.k), f"{p.acceptance_length:.2f}"]
        row += [f"{ms:.2f}" for ms in (p.target_ms, p.draft_ms, p.none_ms)]
        row += [f"{p.break_even:.2f}", speedup, *seen]
        table.add_row(*row, style="bold green" if id(p) in best else None)
    return table


def fit_words(found: WhatIf) -> list[str]:
    """How good the model is, and what the marks mean."""
    fit = fit_summary(found.model)
    line = (
        f"Fitted to {fit['settings']} measured settings, each met to within "
        f"{fit['largest_residual']:.1%}."
    )
    if fit["left_out"]:
        median, largest = fit["left_out_median"], fit["left_out_largest"]
        line += f" {fit['left_out']} of them predicted from the others: {median:.1%} off in the "
        line += f"median, {largest:.1%} at most."
        if found.predictions and found.predictions[0].low is not None:
            line += " Ranges below the speedups are 95% intervals of what that makes of them."
    else:
        line += " Too few to predict any of them from the others: measure more cells to test it."
    lines = [line]
    if any(p.beyond for p in found.predictions):
        lines.append("* beyond what was measured: a longer draft, or more tokens in a step.")
    return lines
