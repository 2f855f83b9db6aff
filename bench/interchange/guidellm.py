"""The JSON of `guidellm run` (version 2 of its reports).

Source: guidellm/benchmark/schemas and guidellm/schemas/base (0.8): a benchmark a load, each with
`requests.successful`, `errored` and `incomplete`; times are seconds of the wall clock. Of a
request's pieces it keeps when the first and the last came, and their number.
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench.interchange.foreign import ForeignRun, Measured, answer_of, require
from bench.records.run import Answer, Block
from bench.server.arrivals import Load
from drafts.errors import UserError

TOOL = "guidellm"
VERSION = 2
CLOSED = ("synchronous", "concurrent")
OPEN = ("constant", "poisson", "throughput")

Json = dict[str, Any]


def is_one(content: Any) -> bool:
    """Whether this is what the tool writes."""
    return isinstance(content, dict) and "benchmarks" in content and "metadata" in content


def read(content: Json, path: Path) -> ForeignRun:
    """The run. Raises `UserError` for a report of another version, and for one without requests."""
    version = content["metadata"].get("version")
    require(
        version == VERSION,
        path,
        f"is a report of version {version} of {TOOL}'s, expected {VERSION}",
        "measure with guidellm 0.8, or write the file again with its `export`",
    )
    require(bool(content["benchmarks"]), path, "has no benchmarks", "give a finished run")
    benchmarks = content["benchmarks"]
    model = str(benchmarks[0]["config"]["backend"].get("model") or "unnamed")
    settings = {
        "guidellm": content["metadata"].get("guidellm_version"),
        "request_body": ((benchmarks[0]["config"]["backend"].get("extras") or {}).get("body")),
    }
    loads = [_measured(one, path) for one in benchmarks]
    begun = datetime.fromtimestamp(benchmarks[0]["start_time"], UTC)
    kept = {key: value for key, value in settings.items() if value}
    return ForeignRun(TOOL, path, model, loads, begun, kept)


def _measured(benchmark: Json, path: Path) -> Measured:
    requests = benchmark["requests"]
    begin, end = (benchmark[name] for name in ("start_time", "end_time"))
    answers = [_answer(one, begin, None) for one in requests.get("successful") or []]
    require(
        bool(answers),
        path,
        "holds no requests that succeeded",
        "let guidellm keep all of them: without a sample_size for its requests",
    )
    answers += [
        _answer(one, begin, str(one["info"].get("error") or "failed"))
        for one in requests.get("errored") or []
    ]
    block = Block(end - begin, 0.0, sorted(answers, key=lambda answer: answer.sent))
    return Measured(_load(benchmark["config"]["strategy"], path), block, None, pieces=False)


def _answer(request: Json, begin: float, error: str | None) -> Answer:
    times = request["info"]["timings"]
    sent = (times.get("request_start") or times["resolve_start"]) - begin
    ends = [times.get("first_token_iteration"), times.get("last_token_iteration")]
    return answer_of(
        sent,
        [] if error else [moment - begin for moment in ends if moment is not None],
        int(request.get("output_tokens") or 0),
        error=error,
        text=str(request.get("output") or ""),
        prompt_tokens=request.get("prompt_tokens"),
    )


def _load(strategy: Json, path: Path) -> Load:
    kind = strategy["type_"]
    if kind in CLOSED:
        return Load(concurrency=int(strategy.get("streams") or 1))
    if kind in OPEN:
        return Load(rate=float(strategy.get("rate") or "inf"))
    raise UserError(
        f"was measured with the strategy {kind!r}",
        where=path,
        hint=f"give a run of {', '.join((*CLOSED, *OPEN))}",
    )
