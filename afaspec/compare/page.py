"""study.html: the study as one page that needs no other file and no network."""

from __future__ import annotations

from pathlib import Path

from afaspec.compare.plan import Json
from afaspec.compare.plots import shown, svg_overall_plots, svg_study_plots
from afaspec.compare.tables import (
    COLUMNS,
    COMPARED,
    POOLED,
    SERVED,
    comparison_rows,
    domain_rows,
    headline,
    pooled_rows,
    served_rows,
    settings_line,
    verdicts,
)
from bench.records.arms import LABELS
from bench.report.markup import definitions, page, paragraph, plain_table, plot_grid, section, table
from bench.report.plots.style import colours_of
from drafts.files import atomic_file

NOTE = (
    "Ranges are 95% intervals over training seeds and prompts together. Differences are paired by "
    "prompt and seed. Gap closed: 0% is plain LoRA of rank 8, 100% full fine-tuning at the same "
    "budget; shown where these two differ."
)
POOLED_NOTE = (
    "Mean relative difference in acceptance length over all points (ranks, budgets) and domains at "
    "which both arms were measured, each domain with the same weight; 95% intervals over seeds and "
    "prompts, Holm's correction over the rows."
)
PROTOCOL = (
    "Prompts are divided by a hash of their content into train, validation and eval. Each arm's "
    "learning rate is the one with the best acceptance length on the validation side; rates within "
    "{tie:.1%} of it count as equal and the smallest is taken; a grid whose best rate lies at its "
    "end grows there, up to {extensions} times. All arms train on the same sequences in the same "
    "order for the same steps, and are measured as merged. The eval side decides on nothing."
)


def write_study_page(study: Json, path: Path) -> Path:
    """Write the page atomically; returns `path`."""
    body = [_overall(study)]
    body += [_domain(study, domain) for domain in study["domains"]]
    body += [section("Learning rates", _rates(study)), section("How it was measured", _how(study))]
    text = page(
        "Training comparison",
        headline(study),
        settings_line(study),
        "\n".join(part for part in body if part),
        "The same figures, and every count behind them, are in study.json; study.csv has a row "
        "per arm and seed.",
    )
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _overall(study: Json) -> str:
    """All comparisons in one plot, and each two arms over all points where both were measured."""
    plots = svg_overall_plots(study)
    if not plots:
        return ""
    pooled = study["pooled"]
    return section(
        "All comparisons",
        plot_grid(plots),
        plain_table(POOLED, pooled_rows(study)) if pooled else "",
        paragraph(POOLED_NOTE, "note") if pooled else "",
    )


def _domain(study: Json, domain: str) -> str:
    results = study["domains"][domain]
    colours = colours_of([{"name": name} for name in ("base", *study["settings"]["arms"])])
    swatches = [colours["base"], *(colours[arm["arm"]] for arm in results["arms"])]
    sides = results["sequences"]
    counts = (
        f"{sides['train']} sequences to train on, {sides['validation']} to validate on, "
        f"{sides['eval']} to measure on."
    )
    return section(
        domain,
        table(COLUMNS, domain_rows(results), swatches=swatches),
        paragraph(f"{counts} {NOTE}", "note"),
        *(paragraph(f"{words}.") for words in verdicts(results)),
        plot_grid(svg_study_plots(study, domain)),
        plain_table(COMPARED, comparison_rows(results)) if results["comparisons"] else "",
        plain_table(SERVED, served_rows(results)) if results["vllm"] else "",
    )


def _rates(study: Json) -> str:
    """Every rate that was tried, with the acceptance length that it gave; the chosen one named."""
    rows = []
    for domain, results in study["domains"].items():
        for arm in results["arms"]:
            tries = ", ".join(f"{t['rate']:g}: {t['length']:.3f}" for t in arm["tries"])
            chosen = f"{arm['learning_rate']:g}" + (" (at the edge)" if arm["rate_at_edge"] else "")
            rows.append([f"{domain}: {shown(arm)}", chosen, tries or "given"])
    return plain_table(("Arm", "Chosen", "Validation acceptance length by rate tried"), rows)


def _how(study: Json) -> str:
    settings, facts = study["settings"], study["facts"]
    rule = settings["tuning"]
    made = study["cells"][-1]["made"]
    return paragraph(PROTOCOL.format(**rule)) + definitions(
        {
            "target": f"{facts['target']} ({facts['target_sha256'][:12]})",
            "draft": f"{facts['draft']} ({facts['draft_sha256'][:12]})",
            "arms": ", ".join(
                f"{LABELS.get(name, name)}: {arm['arm']}" for name, arm in settings["arms"].items()
            ),
            "seeds": settings["seeds"],
            "training settings of all arms": _training(study),
            "domains": {name: d["prompts"] for name, d in settings["domains"].items()},
            "machine": made["machine"],
            "versions": made["versions"],
            "git": made["git"],
            "finished": made["time"],
        }
    )


def _training(study: Json) -> Json:
    """The settings that all runs share."""
    runs = [cell["settings"] for cell in study["cells"] if cell["kind"] == "run"]
    return {k: v for k, v in runs[0].items() if all(run.get(k) == v for run in runs)}
