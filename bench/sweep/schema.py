"""A finished sweep as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bench.records.speeds import REQUEST

SCHEMA = "afaspec-sweep/2"
PLAIN_RATE = f"none_{REQUEST.rate}"  # of the arm without a draft, beside a cell

Json = dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """A finished sweep. `cells` and `findings` are JSON objects (see `build_sweep`)."""

    cells: list[Json]
    findings: list[Json]
    provenance: Json

    def as_json(self) -> Json:
        """The content of sweep.json."""
        return {
            "schema": SCHEMA,
            "findings": self.findings,
            "cells": self.cells,
            "provenance": self.provenance,
        }
