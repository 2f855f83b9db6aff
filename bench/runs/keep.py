"""What drafts keep of the base draft's acceptance on general prompts, beside the domain's.

Two runs of the same arms: one over prompts of the domain, one over general ones. Within the general
run each draft is compared with the base draft on the same prompts, so what it kept has an interval
that is paired by prompt. A run that has figures of general prompts itself, as a demo's, needs no
other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich import box
from rich.table import Table

from bench.report.console import cell_text
from bench.report.words import TableCell, figure_cell
from bench.runs.compare import flat
from bench.runs.saved import SavedRun
from bench.stats.verdict import ACCEPTANCE
from drafts.errors import UserError

BASE = "base"
# What must be the same in both runs, by dotted name in the provenance.
SETTINGS = ("target.sha256", "k", "temperature", "dtype", "mode")
LOWER, HIGHER = "lower", "higher"

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Kept:
    """A draft's acceptance length on the domain and on general prompts, as figures.

    `share` is the general one as a share of the base draft's, with its interval; None for the base
    draft itself. `lower` says that it is shown to be less than the base draft's.
    """

    label: str
    domain: Json
    general: Json
    share: Json | None
    lower: bool = False


def kept_on(run: SavedRun, general: SavedRun) -> list[Kept]:
    """Every draft of `run` beside the base draft of `general`, the base draft first.

    Raises `UserError` where the runs are not of the same target, drafts and settings, where the
    general one has no arm `base`, or where its prompts are too few for an interval.
    """
    here, there = flat(run.report.provenance), flat(general.report.provenance)
    for name in SETTINGS:
        if here.get(name) != there.get(name):
            raise UserError(
                f"{name} is {there.get(name)}, in {run.path} it is {here.get(name)}",
                where=general.path,
                hint="measure both runs with the same target and settings",
            )
    if here.get("prompts_sha256") == there.get("prompts_sha256") is not None:
        raise UserError(
            f"was measured on the prompts of {run.path}",
            where=general.path,
            hint="give a run over general prompts",
        )
    arms = {arm["name"]: arm for arm in run.report.arms if measured(arm)}
    others = {arm["name"]: arm for arm in general.report.arms if measured(arm)}
    for name in (BASE, *arms):
        if name not in others or name not in arms:
            where = run if name not in arms else general
            raise UserError(
                f"has no draft {name!r} with an acceptance length",
                where=where.path,
                hint=f"measure both runs with the same drafts, the base's as --draft {BASE}=...",
            )
        if _draft(arms[name]) != _draft(others[name]):
            raise UserError(
                f"measured another draft as {name!r} than {run.path}",
                where=general.path,
                hint="measure both runs with the same drafts",
            )
    found = []
    for name in sorted(arms, key=lambda name: name != BASE):
        share, lower = (None, False) if name == BASE else _share(general, name)
        figures = arms[name][ACCEPTANCE], others[name][ACCEPTANCE]
        found.append(Kept(arms[name]["label"], *figures, share, lower))
    return found


def kept_within(run: SavedRun) -> list[Kept]:
    """Every draft of `run` by its own figures of general prompts, the base draft first.

    Raises `UserError` where it has none, or too few prompts for an interval.
    """
    arms = [arm for arm in run.report.arms if measured(arm) and arm.get("general")]
    if not arms or arms[0]["name"] != BASE:
        raise UserError(
            "has no figures of general prompts of its own",
            where=run.path,
            hint="give a run of the same drafts over general prompts: --keep RUN=SHARE",
        )
    found = []
    for arm in arms:
        share = arm["general"]["kept"]
        if arm["name"] != BASE and (share is None or share["high"] is None):
            raise UserError(
                f"has no interval for {arm['name']!r} beside the base draft",
                where=run.path,
                hint="measure more general prompts",
            )
        figures = arm[ACCEPTANCE], arm["general"]["acceptance_length"]
        lower = share is not None and share["high"] < 1
        found.append(Kept(arm["label"], *figures, share, lower))
    return found


def lost(found: Sequence[Kept], general: str, share: float) -> list[str]:
    """The drafts that kept less than `share`, in sentences; `general` is what they were held on.

    As in a gate, less is what is shown to be lower, with its whole interval below `share`.
    """
    return [
        f"{one.label}: keeps {one.share['value']:.1%} of the base draft's acceptance length on "
        f"{general} ({one.share['low']:.1%} to {one.share['high']:.1%}), "
        f"less than {share:.1%}"
        for one in found
        if one.share and one.lower and one.share["high"] < share
    ]


def render_kept(found: Sequence[Kept], run: SavedRun, general: str) -> Table:
    """The table for the console: acceptance lengths on both, and the share kept."""
    table = Table(
        box=box.SIMPLE_HEAD,
        header_style="bold",
        pad_edge=False,
        caption="acceptance lengths with 95% intervals; kept: of the base draft's, same prompts",
    )
    for column in ("", run.name, general, "Kept"):
        table.add_column(column, justify="right" if column else "left", overflow="fold")
    for one in found:
        share = _percent(one.share)
        cells = [figure_cell(one.domain, "{:.2f}"), figure_cell(one.general, "{:.2f}"), share]
        table.add_row(one.label, *(cell_text(cell, "bold") for cell in cells))
    return table


def measured(arm: Json) -> bool:
    """Whether the arm is a draft whose acceptance was measured."""
    figure = arm[ACCEPTANCE]
    return arm["name"] not in ("none", "ngram") and bool(figure) and figure["value"] is not None


def _draft(arm: Json) -> Any:
    return (arm["provenance"].get("draft") or {}).get("sha256")


def _share(general: SavedRun, name: str) -> tuple[Json, bool]:
    """What the general run says of the draft beside the base draft, whichever came first."""
    for entry in general.report.comparisons:
        pair = entry["arm"], entry["against"]
        if entry["metric"] != ACCEPTANCE or set(pair) != {name, BASE}:
            continue
        ends = {key: entry["relative"][key] for key in ("value", "low", "high")}
        if None in ends.values():
            break
        share = {key: 1 + end for key, end in ends.items()}
        if pair[0] == BASE:
            value, low, high = (1 / share[key] for key in ("value", "high", "low"))
            return {"value": value, "low": low, "high": high}, entry["verdict"] == HIGHER
        return share, entry["verdict"] == LOWER
    raise UserError(
        f"has no interval for {name!r} beside the base draft",
        where=general.path,
        hint="measure more general prompts",
    )


def _percent(share: Json | None) -> TableCell:
    if share is None:
        return TableCell("–")
    value, low, high = (f"{share[key]:.1%}" for key in ("value", "low", "high"))
    return TableCell(value, f"{low}–{high}")
