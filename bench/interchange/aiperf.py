"""The records by request of `aiperf profile`: profile_export.jsonl.

Source: AIPerf 0.13: a line a request, with `metadata` (times in ns of the wall clock) and `metrics`
({value, unit}); `inter_chunk_latency` has the gaps between pieces. The load is in
profile_export_aiperf.json beside it, where that was written.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from bench.interchange.foreign import ForeignRun, Measured, answer_of, require
from bench.records.run import Answer, Block
from bench.server.arrivals import Load

TOOL = "AIPerf"
RECORDS, SUMMARY = "profile_export.jsonl", "profile_export_aiperf.json"
PHASE = "profiling"
NS, MS = 1e9, 1e3

Json = dict[str, Any]


def is_one(content: Any) -> bool:
    """Whether this is a line that the tool writes."""
    return isinstance(content, dict) and {"metadata", "metrics"} <= content.keys()


def read(records: Sequence[Json], path: Path) -> ForeignRun:
    """The run of the requests that were measured, without those of a warm-up."""
    measured = [one for one in records if one["metadata"].get("benchmark_phase", PHASE) == PHASE]
    require(bool(measured), path, "holds no measured requests", "give the records of a whole run")
    begin = min(_seconds(one, "request_start_ns") for one in measured)
    end = max(_seconds(one, "request_end_ns") for one in measured)
    answers = [_answer(one, begin) for one in measured]
    load, model = _load(path.with_name(SUMMARY), answers)
    block = Block(end - begin, 0.0, sorted(answers, key=lambda answer: answer.sent))
    begun = datetime.fromtimestamp(begin, UTC)
    return ForeignRun(TOOL, path, model, [Measured(load, block)], begun)


def _seconds(record: Json, name: str) -> float:
    return float(record["metadata"][name]) / NS


def _answer(record: Json, begin: float) -> Answer:
    metrics = {name: found["value"] for name, found in record["metrics"].items()}
    sent, error = _seconds(record, "request_start_ns") - begin, record.get("error")
    chunks = []
    if "time_to_first_token" in metrics:
        gaps = [gap / MS for gap in metrics.get("inter_chunk_latency") or []]
        chunks = list(accumulate(gaps, initial=sent + metrics["time_to_first_token"] / MS))
    tokens = metrics.get("usage_completion_tokens") or metrics.get("output_sequence_length") or 0
    return answer_of(
        sent,
        [] if error else chunks,
        int(tokens),
        error=json.dumps(error)[:300] if error else None,
        prompt_tokens=metrics.get("usage_prompt_tokens") or metrics.get("input_sequence_length"),
    )


def _load(summary: Path, answers: Sequence[Answer]) -> tuple[Load, str]:
    """The load and the model's name; the most requests at once where nothing says them."""
    content = json.loads(summary.read_text(encoding="utf-8")) if summary.is_file() else {}
    config = content.get("input_config") or {}
    models = (config.get("models") or {}).get("items") or [{"name": "unnamed"}]
    phases = [one for one in config.get("phases") or [] if one.get("kind") == PHASE] or [{}]
    if rate := phases[0].get("rate"):
        return Load(rate=float(rate)), models[0]["name"]
    at_once = int(phases[0].get("concurrency") or _most_at_once(answers))
    return Load(concurrency=at_once), models[0]["name"]


def _most_at_once(answers: Sequence[Answer]) -> int:
    good = [answer for answer in answers if answer.error is None]
    begins = np.sort([answer.sent for answer in good])
    ends = np.sort([answer.chunks[-1] for answer in good])
    running = np.arange(1, len(good) + 1) - np.searchsorted(ends, begins, side="right")
    return int(running.max(initial=1))


def write(blocks: Sequence[Block]) -> list[Json]:
    """The lines for one arm at one load; times count from the begin of its first round."""
    lines, at = [], 0.0
    for block in blocks:
        lines += [_record(answer, at) for answer in block.answers]
        at += block.wall_seconds
    return lines


def summary(load: Load, model: str) -> Json:
    """Of the file beside the lines what says how they were measured."""
    finite = load.rate is not None and np.isfinite(load.rate)
    asked = {"rate": load.rate} if finite else {"concurrency": load.concurrency}
    phase = {"name": PHASE, "kind": PHASE, **asked}
    return {"input_config": {"models": {"items": [{"name": model}]}, "phases": [phase]}}


def _record(answer: Answer, at: float) -> Json:
    end = at + (answer.chunks[-1] if len(answer.chunks) else answer.sent)
    metadata = {
        "request_start_ns": round(NS * (at + answer.sent)),
        "request_end_ns": round(NS * end),
        "benchmark_phase": PHASE,
        "was_cancelled": False,
    }
    if answer.error is not None:
        return {"metadata": metadata, "metrics": {}, "error": {"message": answer.error}}
    first, gaps = answer.chunks[0] - answer.sent, np.diff(answer.chunks)
    metrics: Json = {
        "time_to_first_token": _metric(MS * first, "ms"),
        "inter_chunk_latency": _metric([MS * float(gap) for gap in gaps], "ms"),
        "request_latency": _metric(MS * (answer.chunks[-1] - answer.sent), "ms"),
        "output_sequence_length": _metric(answer.tokens, "tokens"),
    }
    if answer.prompt_tokens is not None:
        metrics["input_sequence_length"] = _metric(answer.prompt_tokens, "tokens")
    if answer.tokens > 1:
        each = (answer.chunks[-1] - answer.chunks[0]) / (answer.tokens - 1)
        metrics["inter_token_latency"] = _metric(MS * each, "ms")
    return {"metadata": metadata, "metrics": metrics}


def _metric(value: Any, unit: str) -> Json:
    return {"value": value, "unit": unit}
