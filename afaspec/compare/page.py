"""study.html from a study: its values, which bench/report/templates/study.html lays out."""

from __future__ import annotations

from afaspec.compare.plan import Json
from afaspec.compare.plots import overall_plots, shown, study_plots
from afaspec.compare.tables import (
    COMPARED,
    POOLED,
    SERVED,
    columns_of,
    comparison_rows,
    domain_rows,
    headline,
    pooled_rows,
    served_rows,
    settings_line,
    verdicts,
)
from bench.records.arms import LABELS
from bench.report.html import PageTable, render
from bench.report.plots.style import as_svgs, colours_of

RATES = ("Arm", "Chosen", "Validation acceptance length by rate tried")


def render_study(study: Json) -> str:
    """The page: all comparisons, each domain, the learning rates, and how it was measured."""
    plots = as_svgs(overall_plots(study))
    tuning = study["settings"]["tuning"]
    return render(
        "study.html",
        headline=headline(study),
        settings=settings_line(study),
        plots=plots,
        pooled=PageTable(POOLED, pooled_rows(study)) if plots and study["pooled"] else None,
        domains=[_domain(study, domain) for domain in study["domains"]],
        rates=PageTable(RATES, _rates(study)),
        tie=f"{tuning['tie']:.1%}",
        extensions=tuning["extensions"],
        provenance=_provenance(study),
    )


def _domain(study: Json, domain: str) -> Json:
    """What the page shows of one domain."""
    results = study["domains"][domain]
    colours = colours_of([{"name": name} for name in ("base", *study["settings"]["arms"])])
    swatches = [colours["base"], *(colours[arm["arm"]] for arm in results["arms"])]
    sides = results["sequences"]
    compared, served = comparison_rows(results), served_rows(results)
    return {
        "name": domain,
        "arms": PageTable(columns_of(results), domain_rows(results), swatches),
        "counts": f"{sides['train']} sequences to train on, {sides['validation']} to validate on, "
        f"{sides['eval']} to measure on.",
        "verdicts": verdicts(results),
        "plots": as_svgs(study_plots(study, domain)),
        "comparisons": PageTable(COMPARED, compared) if compared else None,
        "served": PageTable(SERVED, served) if served else None,
    }


def _rates(study: Json) -> list[list[str]]:
    """Every rate that was tried, with the acceptance length that it gave; the chosen one named."""
    rows = []
    for domain, results in study["domains"].items():
        for arm in results["arms"]:
            tries = ", ".join(f"{t['rate']:g}: {t['length']:.3f}" for t in arm["tries"])
            chosen = f"{arm['learning_rate']:g}" + (" (at the edge)" if arm["rate_at_edge"] else "")
            rows.append([f"{domain}: {shown(arm['label'])}", chosen, tries or "given"])
    return rows


def _provenance(study: Json) -> Json:
    """How the study was measured, by name."""
    settings, facts, made = study["settings"], study["facts"], study["cells"][-1]["made"]
    first, *others = (cell["settings"] for cell in study["cells"] if cell["kind"] == "run")
    shared = {k: v for k, v in first.items() if all(run.get(k) == v for run in others)}
    return {
        "target": f"{facts['target']} ({facts['target_sha256'][:12]})",
        "draft": f"{facts['draft']} ({facts['draft_sha256'][:12]})",
        "arms": ", ".join(
            f"{LABELS.get(name, name)}: {arm['arm']}" for name, arm in settings["arms"].items()
        ),
        "seeds": settings["seeds"],
        "training settings of all arms": shared,
        "domains": {name: d["prompts"] for name, d in settings["domains"].items()},
        "machine": made["machine"],
        "versions": made["versions"],
        "git": made["git"],
        "finished": made["time"],
    }
