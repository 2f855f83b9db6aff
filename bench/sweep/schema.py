"""A finished sweep as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

SCHEMA = "afaspec-sweep/1"

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
