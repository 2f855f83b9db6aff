"""A sweep's result: sweep.json, sweep.csv, plots and one self-contained page."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from bench.records.speeds import DECODE, REQUEST
from bench.stats.intervals import Quotient, student
from bench.stats.resample import Figure
from bench.sweep.best_k import (
    Best,
    accounts,
    best_k,
    load_advice,
    schedule,
    speed,
    speedup,
    wave_sums,
)
from bench.sweep.cells import CellResult, mean_occupancy
from bench.sweep.schema import PLAIN_RATE, Json, Sweep
from drafts.files import atomic_file, write_json

SETTINGS = ("arm", "k", "temperature", "concurrency", "max_tokens", "draft_sample_method")
FIGURES = (
    "acceptance_length",
    "acceptance_rate",
    REQUEST.rate,
    PLAIN_RATE,
    DECODE.rate,
    REQUEST.speedup,
)


def build_sweep(results: Sequence[CellResult], provenance: Json) -> Sweep:
    """Figures of every cell, and per draft and condition which k is best at each concurrency.

    `request_tokens_per_second` is that of one request while all of a wave run, and
    `request_speedup` its quotient by that of `none` beside it; `decode_tokens_per_second` are all
    tokens of a wave by the time until its last request ends.
    """
    findings = []
    measured = [result for result in results if result.series is not None]
    for arm, condition in dict.fromkeys((r.arm, r.condition) for r in measured):
        own = [r for r in measured if (r.arm, r.condition) == (arm, condition)]
        bests = [
            best_k(load, [speedup(r) for r in own if r.concurrency == load])
            for load in sorted({r.concurrency for r in own})
        ]
        findings.append(_finding(own[0], bests))
    return Sweep([_cell(result) for result in results], findings, provenance)


def write_sweep(sweep: Sweep, folder: Path) -> Path:
    """Write plots, CSV, page and sweep.json, each atomically; returns the page's path."""
    from bench.report.html import write_page
    from bench.report.plots.style import write_pngs
    from bench.sweep.page import render_page
    from bench.sweep.plots import sweep_plots

    write_pngs(sweep_plots(sweep), folder)
    page = write_page(render_page(sweep), folder / "sweep.html")
    with (
        atomic_file(folder / "sweep.csv") as temporary,
        temporary.open("w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.writer(file)
        ends = [f"{name}{end}" for name in FIGURES for end in ("", "_low", "_high")]
        writer.writerow([*SETTINGS, *ends, "refused"])
        writer.writerows(_csv_row(cell) for cell in sweep.cells)
    write_json(folder / "sweep.json", sweep.as_json())
    return page


def _cell(result: CellResult) -> Json:
    cell: Json = {
        "arm": result.arm,
        "label": result.label,
        "k": result.k,
        "temperature": result.temperature,
        "concurrency": result.concurrency,
        "max_tokens": result.max_tokens,
        "draft_sample_method": result.sample_method,
        "refused": result.refused,
        **dict.fromkeys(FIGURES),
    }
    if result.series is None or result.none is None:
        return cell
    series, load = result.series, result.concurrency
    accepted = np.array(series.accepted)
    drafts = np.array(series.drafts)
    total = Quotient(wave_sums(series.tokens, load), np.array(series.wave_seconds))
    before = np.concatenate([drafts[:, :, None], accepted[:, :, :-1]], axis=2)
    length = _figure(Quotient(accepted.sum(axis=2), drafts))
    return cell | {
        "acceptance_length": Figure(*(1 + end for end in vars(length).values())).as_json(),
        "acceptance_rate": _figure(
            Quotient(accepted.sum(axis=2), np.array(series.drafted))
        ).as_json(),
        "conditional": [
            _figure(Quotient(accepted[:, :, i], before[:, :, i])).as_json() for i in range(result.k)
        ],
        REQUEST.rate: _figure(speed(series, load)).as_json(),
        PLAIN_RATE: _figure(speed(result.none, load)).as_json(),
        DECODE.rate: _figure(total).as_json(),
        REQUEST.speedup: speedup(result).figure.as_json(),
        "running": mean_occupancy(series.steps, load),
    }


def _figure(quotient: Quotient) -> Figure:
    return student(quotient.value, accounts(quotient.influence))


def _finding(result: CellResult, bests: list[Best]) -> Json:
    return {
        "arm": result.arm,
        "label": result.label,
        "temperature": result.temperature,
        "max_tokens": result.max_tokens,
        "draft_sample_method": result.sample_method,
        "loads": [best.as_json() for best in bests],
        "words": [f"{best.words}." for best in bests],
        "advice": load_advice(bests),
        "num_speculative_tokens_per_batch_size": schedule(bests),
    }


def _csv_row(cell: Json) -> list[Any]:
    ends = [
        None if cell[name] is None else cell[name][end]
        for name in FIGURES
        for end in ("value", "low", "high")
    ]
    return [*(cell[name] for name in SETTINGS), *ends, cell["refused"]]
