"""Our runs in the formats of other tools: a file for each arm at each load."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter

from bench.interchange import aiperf, vllm_bench
from bench.records.run import Block
from bench.runs.saved import SavedRun
from bench.server.arrivals import Load
from drafts.errors import UserError
from drafts.files import atomic_file
from serving.metrics import ServerCounters, sum_counters

Tool = Literal["vllm-bench", "aiperf"]


def export(run: SavedRun, tool: Tool, out: Path) -> list[Path]:
    """Write the server run's requests into `out`; the files. Raises `UserError` for a run that has
    none: in process nobody sees pieces arrive."""
    loads = run.report.measurements.get("loads")
    if not loads:
        raise UserError(
            "has no requests of servers, with times of their own",
            where=run.path,
            hint="give a run with --url or --serve, with its measurements.json beside report.json",
        )
    out.mkdir(parents=True, exist_ok=True)
    written = []
    for step in loads:
        rate = step.get("request_rate")
        load = Load(step.get("concurrency"), None if rate is None else float(rate))
        for name, measured in step["arms"].items():
            blocks = TypeAdapter(list[Block]).validate_python(measured["turns"])
            counters = TypeAdapter(list[ServerCounters | None]).validate_python(
                measured["counters"]
            )
            provenance = run.report.arm(name)["provenance"]
            model = str(provenance.get("model") or provenance["target"]["path"])
            stem = re.sub(r"[^\w.-]+", "-", f"{name}-{load.words}")
            if tool == "vllm-bench":
                spent = sum_counters([found.spec for found in counters if found])
                path = out / f"{stem}.json"
                lines = [vllm_bench.write(load, blocks, spent, model)]
            else:
                path = out / stem / aiperf.RECORDS
                path.parent.mkdir(exist_ok=True)
                lines = aiperf.write(blocks)
                _write(path.with_name(aiperf.SUMMARY), [aiperf.summary(load, model)])
            _write(path, lines)
            written.append(path)
    return written


def _write(path: Path, lines: Sequence[object]) -> None:
    with atomic_file(path) as part:
        part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
