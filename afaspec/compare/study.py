"""study.json: every task with all that was counted, and what follows from it.

All figures, tables, plots and pages are made from the stored tasks and nothing else, so that
`afaspec compare --report-only` makes them again.
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from afaspec.compare.config import GENERAL, CompareConfig
from afaspec.compare.data import Facts
from afaspec.compare.estimate import spent_seconds
from afaspec.compare.figures import (
    REFERENCE_RANK,
    Measured,
    Pairs,
    comparable_pairs,
    difference,
    figures_of,
    gap_closed,
    kept_of,
    pooled_difference,
)
from afaspec.compare.ledger import Ledger
from afaspec.compare.plan import Json, Plan, Variant, variants
from afaspec.compare.tables import readable
from bench.stats.verdict import Comparison, correct
from drafts.errors import UserError
from drafts.files import atomic_file

SCHEMA = "afaspec-study/1"


def build_study(config: CompareConfig, facts: Facts, plan: Plan, ledger: Ledger) -> Json:
    """The content of study.json. Variants without all their seeds are left out of the results.

    Raises `UserError` where no domain has a result yet.
    """
    finished = [task for task in plan.tasks if task.key in ledger]
    measured = {
        domain: _measured(config, plan, ledger, domain)
        for domain in config.domains
        if plan.only("base", domain).key in ledger
    }
    if not any(len(found) > 1 for found in measured.values()):
        raise UserError(
            "holds no finished arm yet",
            where=config.out,
            hint="run afaspec compare without --report-only; it goes on where it stopped",
        )
    pairs = {domain: comparable_pairs(found[1:], config.arms) for domain, found in measured.items()}
    between = _corrected(pairs)
    over_base = _corrected(
        {domain: [(arm, found[0]) for arm in found[1:]] for domain, found in measured.items()}
    )
    return {
        "schema": SCHEMA,
        "complete": len(finished) == len(plan.tasks) and not plan.later,
        "settings": config.model_dump(mode="json"),
        "facts": asdict(facts),
        "domains": {
            domain: {
                "sequences": _sequences(plan, ledger, domain),
                "base": figures_of(found[0]),
                "general": _general(config, plan, ledger),
                "arms": [
                    _arm(config, plan, ledger, domain, arm, gain, found)
                    for arm, gain in zip(found[1:], over_base[domain], strict=True)
                ],
                "comparisons": [_in_words(c) for c in between[domain]],
                "vllm": _vllm(plan, ledger, domain),
            }
            for domain, found in measured.items()
        },
        "pooled": _pooled(pairs),
        "spent_seconds": round(spent_seconds(ledger, finished), 1),
        "cells": [ledger.record(task) for task in finished],
    }


def write_study(study: Json, folder: Path) -> Path:
    """Write tables, plots and page, then study.json; returns the page's path."""
    from afaspec.compare.page import render_study
    from afaspec.compare.plots import all_plots
    from bench.report.plots.style import write_pngs

    write_csv(study, folder / "study.csv")
    write_pngs(all_plots(study), folder)
    page = folder / "study.html"
    with atomic_file(page) as temporary:
        temporary.write_text(render_study(study), encoding="utf-8")
    with atomic_file(folder / "study.json") as temporary:  # too long for an indent
        temporary.write_text(json.dumps(study) + "\n", encoding="utf-8")
    return page


def read_study(path: Path) -> Json:
    """A study.json, gzipped or not. Raises `UserError` for anything else."""
    try:
        raw = path.read_bytes()
        study = json.loads(gzip.decompress(raw) if path.suffix == ".gz" else raw)
        if study["schema"] != SCHEMA:
            raise KeyError
    except FileNotFoundError:
        raise UserError("no such file", where=path, hint="give a study.json(.gz)") from None
    except (OSError, EOFError, ValueError, KeyError, TypeError):
        raise UserError(
            f"is not a study ({SCHEMA})", where=path, hint="give a study.json(.gz)"
        ) from None
    return dict(study)


def _measured(config: CompareConfig, plan: Plan, ledger: Ledger, domain: str) -> list[Measured]:
    """The base draft, then every variant whose seeds are all measured."""
    base = ledger[plan.only("base", domain).key]
    found = [Measured.of("base", [base])]
    for variant in variants(config):
        tasks = [c for c in plan.evals(domain, variant) if c.key in ledger]
        if len(tasks) == len(config.seeds):
            label = variant.label(config)
            found.append(Measured.of(label, [ledger[c.key] for c in tasks], variant))
    return found


def _corrected(by_domain: dict[str, Pairs]) -> dict[str, list[Comparison]]:
    """The differences of the pairs of all domains, corrected for their number in the study."""
    corrected = iter(correct([difference(*pair) for found in by_domain.values() for pair in found]))
    return {domain: [next(corrected) for _ in found] for domain, found in by_domain.items()}


def _pooled(pairs: dict[str, Pairs]) -> list[Json]:
    """Each two arms over all that they were compared at, where that is more than one point."""
    names = dict.fromkeys(_arms_of(pair) for found in pairs.values() for pair in found)
    points = {
        name: {
            domain: chosen
            for domain, found in pairs.items()
            if (chosen := [pair for pair in found if _arms_of(pair) == name])
        }
        for name in names
    }
    several = {name: found for name, found in points.items() if sum(map(len, found.values())) > 1}
    judged = correct(
        [pooled_difference(*name, [*found.values()]) for name, found in several.items()]
    )
    return [
        {**_in_words(comparison), "points": {domain: len(p) for domain, p in found.items()}}
        for comparison, found in zip(judged, several.values(), strict=True)
    ]


def _arms_of(pair: tuple[Measured, Measured]) -> tuple[str, str]:
    first, second = (measured.variant for measured in pair)
    assert first
    assert second
    return first.arm, second.arm


def _in_words(comparison: Comparison) -> Json:
    """The comparison as JSON, its sentence with the arms' names as a reader likes them."""
    arm, against = (readable(label) for label in (comparison.arm, comparison.against))
    return {**comparison.as_json(), "words": replace(comparison, arm=arm, against=against).words}


def _arm(
    config: CompareConfig,
    plan: Plan,
    ledger: Ledger,
    domain: str,
    measured: Measured,
    gain: Comparison,
    found: Sequence[Measured],
) -> Json:
    variant = measured.variant
    assert variant
    choice = plan.choices[domain, variant]
    runs = [ledger[plan.runs[c.key].key] for c in plan.evals(domain, variant)]
    low, high = _ends(config, variant, found)
    return {
        "arm": variant.arm,
        "method": config.arms[variant.arm].arm,
        "rank": variant.rank,
        "steps": variant.steps,
        "samples": variant.samples,
        "learning_rate": choice.rate,
        "tries": [{"rate": r, "length": length} for r, length in sorted(choice.tries.items())],
        "rate_at_edge": choice.at_edge,
        "trainable_parameters": runs[0]["trainable_parameters"],
        "draft_parameters": runs[0]["draft_parameters"],
        "train_seconds": [run["train_seconds"] for run in runs],
        **figures_of(measured),
        "general": _kept(config, plan, ledger, domain, measured),
        "over_base": gain.as_json(),
        "gap_closed": gap_closed(measured, low, high)
        if low and high and measured not in (low, high)
        else None,
    }


def _general(config: CompareConfig, plan: Plan, ledger: Ledger) -> Json | None:
    """The base draft on the general prompts; None in a study that has none, or not yet."""
    if config.general is None or plan.only("base", GENERAL).key not in ledger:
        return None
    return figures_of(Measured.of("base", [ledger[plan.only("base", GENERAL).key]]))


def _kept(
    config: CompareConfig, plan: Plan, ledger: Ledger, domain: str, measured: Measured
) -> Json | None:
    """The arm on the general prompts, beside the base draft; None unless all seeds are there."""
    variant = measured.variant
    assert variant
    tasks = [c for c in plan.evals(domain, variant, "kept") if c.key in ledger]
    if len(tasks) < len(config.seeds) or _general(config, plan, ledger) is None:
        return None
    base = Measured.of("base", [ledger[plan.only("base", GENERAL).key]])
    return kept_of(Measured.of(measured.label, [ledger[c.key] for c in tasks], variant), base)


def _ends(
    config: CompareConfig, variant: Variant, found: Sequence[Measured]
) -> tuple[Measured | None, Measured | None]:
    """Plain LoRA of rank 8 and full fine-tuning at the variant's budget; None where there is none.

    They are the arms named `lora` and `full`, or the first of their method.
    """

    def first(method: str, rank: int | None) -> Measured | None:
        fitting = [
            (m.variant.arm != method, i, m)
            for i, m in enumerate(found)
            if m.variant
            and config.arms[m.variant.arm].arm == method
            and (m.variant.rank, m.variant.steps, m.variant.samples)
            == (rank, variant.steps, variant.samples)
        ]
        return min(fitting)[2] if fitting else None

    return first("lora", REFERENCE_RANK), first("full", None)


def _sequences(plan: Plan, ledger: Ledger, domain: str) -> Json:
    data = ledger[plan.only("data", domain).key]
    return {
        "train": len(data["train"]),
        "validation": len(data["validation"]),
        "eval": data["eval_sequences"],
        "dropped": data["dropped"],
    }


def _vllm(plan: Plan, ledger: Ledger, domain: str) -> list[Json]:
    """Reports of vLLM, one per measured seed."""
    return [
        {"seed": task.seed, "arms": ledger[task.key]["arms"]}
        for task in plan.tasks
        if task.kind == "vllm" and task.domain == domain and task.key in ledger
    ]


def write_csv(study: Json, path: Path) -> None:
    """Write the table, atomically. `mean`, `low` and `high` are the arm's, over its seeds."""
    rows = []
    for domain, results in study["domains"].items():
        rows.append(
            _row(domain, {"arm": "base", "general": results["general"], **results["base"]}, 0, None)
        )
        for arm in results["arms"]:
            rows += [_row(domain, arm, *seed) for seed in enumerate(study["settings"]["seeds"])]
    with atomic_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


def _row(domain: str, arm: Json, i: int, seed: int | None) -> Json:
    """The row of an arm's seed, its i-th; the base draft has none, and nothing that was trained."""
    length, trained = arm["acceptance_length"], seed is not None
    general = arm.get("general")
    return {
        "domain": domain,
        "arm": arm["arm"],
        **{name: arm.get(name) for name in ("rank", "steps", "samples", "learning_rate")},
        "seed": seed,
        "acceptance_length": arm["by_seed"][i],
        "trainable_parameters": arm.get("trainable_parameters"),
        "train_seconds": arm["train_seconds"][i] if trained else None,
        "mean": length["value"],
        "low": length["low"],
        "high": length["high"],
        "gain_over_base": arm["over_base"]["difference"]["value"] if trained else None,
        "gap_closed": (arm.get("gap_closed") or {}).get("value"),
        "general_acceptance_length": general["by_seed"][i] if general else None,
        "general_kept": general["kept"]["value"] if general and trained else None,
    }
