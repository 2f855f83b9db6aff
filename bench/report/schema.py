"""The result of a run as JSON, in a schema that later tools rely on (docs/bench.md lists it)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SCHEMA = "afaspec-report/3"
OLDER_SCHEMAS = ("afaspec-report/1", "afaspec-report/2")  # read as `bench.report.older` says

Json = dict[str, Any]


@dataclass
class Report:
    """A finished comparison. `arms` are JSON objects in the order of the run (see `build_report`).

    `comparisons` are verdicts between arms, `load` the arms at several loads. `measurements` are
    the raw outputs, times and counts by arm; they go to a file of their own. `example` is one
    prompt's id with the `prompt` and `answer` as text.
    """

    arms: list[Json]
    provenance: Json
    noise: Json | None = None
    training: Json = field(default_factory=dict)
    comparisons: list[Json] = field(default_factory=list)
    load: list[Json] | None = None
    example: Json | None = None
    measurements: Json = field(default_factory=dict)

    def arm(self, name: str) -> Json:
        """The arm of that name; KeyError if the run had none."""
        for arm in self.arms:
            if arm["name"] == name:
                return arm
        raise KeyError(name)

    def as_json(self) -> Json:
        """The content of report.json."""
        return {
            "schema": SCHEMA,
            "arms": self.arms,
            "comparisons": self.comparisons,
            "load": self.load,
            "numerical_noise": self.noise,
            "training": self.training,
            "example": self.example,
            "provenance": self.provenance,
        }


def load_words(step: Mapping[str, Any]) -> str:
    """A load of `Report.load` by name."""
    if "concurrency" in step:
        return f"concurrency {step['concurrency']}"
    rate = step["request_rate"]
    return "all at once" if rate == "inf" else f"{rate:g} requests/s"


def unexplained(lossless: Mapping[str, Any]) -> int:
    """Outputs that differ from those without speculation, and not at a near-tie: of those that were
    examined, or of all where none was."""
    differing = int(lossless["prompts"] - lossless["matching"])
    examined = lossless.get("examined") or differing  # older reports examined all
    return int(examined - lossless["near_ties"])


def warn(report: Report, found: Mapping[str, str]) -> None:
    """Add to the arms of `report` what a reader should know of them, by name."""
    for arm in report.arms:
        if arm["name"] in found:
            arm["warnings"] = [*(arm.get("warnings") or []), found[arm["name"]]]
