"""A study's tables and sentences, from study.json alone: what page and console both show."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from afaspec.compare.plan import Json
from afaspec.compare.plots import shown
from bench.records.arms import LABELS
from bench.records.speeds import DECODE
from bench.report.older import arm_as_today
from bench.report.words import NOTHING, TableCell
from bench.stats.verdict import NO_DIFFERENCE

FEW = 6  # comparisons that are all told in sentences
COMPARED = ("Arm", "Against", "Difference", "Relative", "p (Holm)", "Verdict")
POOLED = ("Arm", "Against", "Points", "Relative", "p (Holm)", "Verdict")
SERVED = ("Arm in vLLM", "Seed", "Acceptance length", DECODE.rate_label, DECODE.speedup_label)
COLUMNS = (
    "Arm",
    "Acceptance length",
    "More than base",
    "Gap closed",
    "Seeds",
    "Learning rate",
    "Trained weights",
)

BESIDE = ("General prompts", "Kept")  # where the study has such: acceptance length, share of base's


def columns_of(results: Json) -> tuple[str, ...]:
    """The columns of a domain's table."""
    return COLUMNS + (BESIDE if results.get("general") else ())


def domain_rows(results: Json) -> list[list[TableCell]]:
    """One row per arm, in the order of `columns_of`; the longest acceptance is marked."""
    best = max([arm["acceptance_length"]["value"] for arm in results["arms"]], default=0.0)
    base = results["base"]["acceptance_length"]
    rows = [[TableCell(LABELS["base"]), figure(base), *[TableCell(NOTHING)] * (len(COLUMNS) - 2)]]
    if general := results.get("general"):
        rows[0] += [figure(general["acceptance_length"]), TableCell(NOTHING)]
    for arm in results["arms"]:
        length = arm["acceptance_length"]
        lowest, highest = min(arm["by_seed"]), max(arm["by_seed"])
        share = arm["trainable_parameters"] / arm["draft_parameters"]
        rate = TableCell(
            f"{arm['learning_rate']:g}", "at the grid's edge" if arm["rate_at_edge"] else ""
        )
        rows.append(
            [
                TableCell(shown(arm["label"])),
                figure(length, best=length["value"] == best),
                figure(arm["over_base"]["difference"], "{:+.3f}"),
                figure(arm["gap_closed"], "{:.0f}%", 100),
                TableCell(str(len(arm["by_seed"])), f"{lowest:.3f}–{highest:.3f}"),
                rate,
                TableCell(f"{arm['trainable_parameters']:,}", f"{share:.1%}"),
            ]
        )
        if general:
            kept = arm["general"] or {}
            rows[-1] += [
                figure(kept.get("acceptance_length")),
                figure(kept.get("kept"), "{:.1f}%", 100),
            ]
    return rows


def figure(
    found: Json | None, form: str = "{:.3f}", scale: float = 1.0, best: bool = False
) -> TableCell:
    """A value with its interval, where there is one."""
    if not found or found["value"] is None:
        return TableCell(NOTHING)
    value = form.format(scale * found["value"])
    if found["low"] is None:
        return TableCell(value, best=best)
    low, high = (form.format(scale * found[end]) for end in ("low", "high"))
    joined = f"{low} to {high}" if "-" in low or "+" in low else f"{low}–{high}"
    return TableCell(value, joined, best)


def verdicts(results: Json) -> list[str]:
    """What the comparisons between arms show, as sentences; all of them where they are few."""
    found = results["comparisons"]
    told = [c["words"] for c in found if len(found) <= FEW or c["verdict"] != NO_DIFFERENCE]
    if left := len(found) - len(told):
        told.append(f"{left} of {len(found)} comparisons between arms show no difference")
    return told


def comparison_rows(results: Json) -> list[list[str]]:
    """Every comparison between arms, in the order of `COMPARED`."""
    return [
        _compared(found, said(found["difference"], "{:+.3f}")) for found in results["comparisons"]
    ]


def pooled_rows(study: Json) -> list[list[str]]:
    """Each two arms over all points of the study, in the order of `POOLED`."""
    return [
        _compared(found, ", ".join(f"{n} {domain}" for domain, n in found["points"].items()))
        for found in study["pooled"]
    ]


def _compared(found: Json, third: str) -> list[str]:
    """A comparison in six columns, of which the third differs between the tables."""
    names = [shown(found["arm"]), shown(found["against"]), third]
    relative = said(found["relative"], "{:+.1f}%", 100)
    return [*names, relative, f"{found['p_holm']:.3g}", found["verdict"]]


def served_rows(results: Json) -> list[list[str]]:
    """What vLLM measured of the merged drafts, a row per arm and seed, in the order of `SERVED`."""
    return [
        [
            readable(arm["label"]),
            str(report["seed"]),
            *(
                said(arm[name], "{:.2f}")
                for name in ("acceptance_length", DECODE.rate, DECODE.speedup)
            ),
        ]
        for report in results["vllm"]
        for arm in map(arm_as_today, report["arms"])  # a study may be older
    ]


def readable(label: str) -> str:
    """A variant's label with a nicer name for its arm; `bench.stats.verdict` names bare arms."""
    return shown(label) if " " in label else label


def said(found: Json, form: str, scale: float = 1.0) -> str:
    """A figure and its interval in one line."""
    cell = figure(found, form, scale)
    return f"{cell.text} ({cell.detail})" if cell.detail else cell.text


def headline(study: Json) -> str:
    """One sentence per domain: which arm came out highest, and where it comes from."""
    sentences = []
    for domain, results in study["domains"].items():
        if results["arms"]:
            top = max(results["arms"], key=lambda arm: arm["acceptance_length"]["value"])
            length, base = (of["acceptance_length"]["value"] for of in (top, results["base"]))
            sentences.append(
                f"{domain}: {shown(top['label'])} came out highest, {length:.2f} tokens per target "
                f"step (base draft {base:.2f})."
            )
            if kept := top.get("general"):
                sentences.append(f"On general prompts it kept {kept['kept']['value']:.1%}.")
    return " ".join(sentences)


def settings_line(study: Json) -> str:
    """The study's main settings in one line."""
    settings, runs = study["settings"], [c for c in study["cells"] if c["kind"] == "run"]

    def counted(values: Sequence[object], what: str) -> str:
        return f"{len(values)} {what}" + ("s" if len(values) != 1 else "")

    parts = [
        counted(settings["arms"], "arm"),
        counted(settings["domains"], "domain"),
        counted(settings["seeds"], "seed"),
        f"k = {settings['k']}",
        "greedy, offline" + (" and in vLLM" if settings["measure"] == "vllm" else ""),
        counted(runs, "training"),
        f"{study['spent_seconds'] / 3600:.1f} hours of work",
    ]
    return ", ".join(parts) + ("" if study["complete"] else "; not finished")


def render_domain(domain: str, results: Json) -> Table:
    """The domain's table for the console."""
    table = Table(
        title=domain, title_justify="left", box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False
    )
    for column in columns_of(results):
        justify = "left" if column == COLUMNS[0] else "right"
        table.add_column(column.replace(" ", "\n"), justify=justify, no_wrap=column == COLUMNS[0])  # type: ignore[arg-type]
    for row in domain_rows(results):
        cells = []
        for cell in row:
            text = Text(cell.text, style="bold green" if cell.best else "bold")
            if cell.detail:
                text.append(f"\n{cell.detail}", style="not bold dim")
            cells.append(text)
        table.add_row(*cells)
    return table
