"""Is the new draft better where it is to serve, and as good elsewhere? Measured, not hoped for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from afaspec.loop.adapt import ROWS, Work, general_store
from bench.engine.run import run_bench
from bench.records.arms import Arm
from bench.records.config import BenchConfig
from bench.report.files import read_report, write_report
from bench.report.schema import Report, unexplained
from bench.stats.offline import offline_acceptance
from bench.stats.verdict import ACCEPTANCE
from drafts.checkpoint.info import DraftInfo
from drafts.registry import load_draft

NONE, OLD, NEW = "none", "current", "new"


@dataclass(frozen=True)
class Verdict:
    """What the gate found: acceptance lengths on the traffic, what is kept of the general one, the
    outputs that speculation changed, and what stands against the new draft."""

    old: float
    new: float
    kept: float
    changed: int
    failures: list[str]

    @property
    def passed(self) -> bool:
        """Whether the new draft may serve."""
        return not self.failures

    @property
    def words(self) -> str:
        """In a line."""
        figures = f"{self.old:.2f} to {self.new:.2f} in vLLM, {self.kept:.1%} of the general kept"
        return f"passed: {figures}" if self.passed else f"{'; '.join(self.failures)} ({figures})"


def judge(work: Work, folder: Path, old: DraftInfo, new: DraftInfo) -> Verdict:
    """Hold the new draft against the one that serves, on prompts that neither learned from.

    The report lies in the cycle's folder; a gate that was killed is done anew.
    """
    page = folder / "gate" / "report.json"
    report = read_report(page) if page.exists() else _measured(work, folder, old, new)
    return verdict(report, work.config.keep)


def verdict(report: Report, keep: float) -> Verdict:
    """What a report says of its arms `current` and `new`."""
    old, new = report.arm(OLD), report.arm(NEW)
    failures = []
    better = next(
        one
        for one in report.comparisons
        if (one["arm"], one["against"], one["metric"]) == (NEW, OLD, ACCEPTANCE)
    )
    if better["verdict"] != "higher":
        failures.append(f"not shown to be better on the traffic: {better['words']}")
    before, now = (arm["general"]["acceptance_length"]["value"] for arm in (old, new))
    kept = now / before
    if kept < keep:
        failures.append(f"keeps {kept:.1%} of the general acceptance, {keep:.0%} are asked")
    changed = unexplained(new["lossless"])
    if changed:
        failures.append(f"{changed} outputs are not those without speculation")
    return Verdict(
        old["acceptance_length"]["value"],
        new["acceptance_length"]["value"],
        kept,
        changed,
        failures,
    )


def _measured(work: Work, folder: Path, old: DraftInfo, new: DraftInfo) -> Report:
    config = work.config
    store = general_store(work, "eval")
    drafts = {OLD: old, NEW: new}
    general = {
        name: offline_acceptance(load_draft(draft, work.target), store, work.k)
        for name, draft in drafts.items()
    }
    report = run_bench(
        BenchConfig(
            target=work.target,
            prompts=str(folder / ROWS),
            arms=(Arm(NONE), *(Arm(name, draft) for name, draft in drafts.items())),
            k=work.k,
            max_tokens=config.new_tokens,
            rounds=1,
            limit=config.gate_prompts,
            split="eval",
            eval_fraction=config.eval_fraction,
            skip_bad_rows=True,
            seed=config.seed,
            enforce_eager=True,  # acceptance is judged, not speed
        ),
        work.stage,
        general=general,
        log_folder=folder / "gate" / "logs",
        note=work.say,
    )
    write_report(report, folder / "gate")
    return report
