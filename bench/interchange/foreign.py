"""What a run of another tool gave, as far as ours are made of the same; and a report of it.

Times by request give every latency and its intervals as for a run of ours. What another tool does
not keep (prompts, token ids, which round a request was of) stays unknown, and says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from bench.records.arms import Arm
from bench.records.run import Answer, Block
from bench.report.schema import Report
from bench.server.arrivals import Load
from bench.server.measure import LoadRun
from bench.server.report import build_server_report
from drafts.errors import UserError
from drafts.files import shown_path
from serving.metrics import ServerCounters, SpecCounters
from serving.remote import RemoteServer

Json = dict[str, Any]
NOT_KNOWN = "not known"
ARM = "server"


@dataclass(frozen=True)
class Measured:
    """All requests at one load, and the server's speculation meanwhile where the tool asked for it.

    `pieces` says whether the arrivals of all pieces are known, or those of the first and last only.
    """

    load: Load
    block: Block
    speculation: SpecCounters | None = None
    pieces: bool = True


@dataclass(frozen=True)
class ForeignRun:
    """One server's run by another `tool`, `begun` by its own clock (with a zone where it says one).

    `settings` are those of the provenance that it keeps.
    """

    tool: str
    path: Path
    model: str
    loads: list[Measured]
    begun: datetime | None = None
    settings: Json = field(default_factory=dict)


def require(found: bool, path: Path, problem: str, hint: str) -> None:
    """Raise `UserError` unless `found`."""
    if not found:
        raise UserError(problem, where=path, hint=hint)


def as_report(run: ForeignRun, seed: int = 0) -> Report:
    """The run as a report of one arm, `server`.

    Raises `UserError` where no request of a load has an answer whose tokens were seen to arrive.
    """
    for one in run.loads:
        require(
            any(answer.error is None for answer in one.block.answers),
            run.path,
            f"no request at {one.load.words} has an answer with the times of its tokens; the "
            f"first: {one.block.answers[0].error}",
            "give a run that was streamed, and whose requests did not all fail",
        )
    k = max((len(one.speculation.accepted_per_position) for one in run.loads if one.speculation),
            default=0)  # fmt: skip
    counted = all(one.speculation is not None for one in run.loads)
    server = RemoteServer("", run.model, run.model, None, None, k, counted=counted, headers={})
    requests = max(len(one.block.answers) for one in run.loads)
    common = _common(run, requests, k)
    report = build_server_report(
        [[_load_run(server, one)] for one in run.loads],
        arms={ARM: Arm(ARM, "unknown")},
        common=common,
        provenance={ARM: {**common, "method": NOT_KNOWN, "k": k or None, "draft": None}},
        prompts=[f"request {number + 1}" for number in range(requests)],
        categories=None,
        warnings={ARM: _unknown(run, counted)},
        seed=seed,
    )
    for step in report.load or [{"arms": report.arms}]:
        (arm,) = step["arms"]
        arm["client"] = None  # what the other tool's client cost, nobody measured
        arm["lossless"] = arm["repeatable"] = None
        if not all(one.pieces for one in run.loads):
            arm["latency"]["itl_ms"] = arm["tokens_per_piece"] = None
    return report


def _load_run(server: RemoteServer, measured: Measured) -> LoadRun:
    answers, counters = measured.block.answers, None
    if server.counted and measured.speculation is not None:
        good = [answer for answer in answers if answer.error is None]
        tokens = sum(answer.tokens for answer in good)
        counters = ServerCounters(len(good), tokens, measured.speculation)
    rounds, counts = [[measured.block]], [[counters]]
    return LoadRun(ARM, server, measured.load, len(answers), rounds=rounds, counters=counts)


def _common(run: ForeignRun, requests: int, k: int) -> Json:
    loads = [one.load for one in run.loads]
    return {
        "mode": "server",
        "target": {"path": run.model, "sha256": None},
        "measured_by": run.tool,
        "source": shown_path(str(run.path)),
        "prompts": requests,
        "prompts_sha256": None,
        "rounds": 1,
        "max_tokens": max(answer.tokens for one in run.loads for answer in one.block.answers),
        "temperature": NOT_KNOWN,
        "dtype": "the server's own type",
        "k": k,
        "loads": [load.words for load in loads],
        "concurrency": ", ".join(str(load.concurrency) for load in loads if load.concurrency),
        "time": run.begun.isoformat(timespec="seconds") if run.begun else NOT_KNOWN,
        **run.settings,
    }


def _unknown(run: ForeignRun, counted: bool) -> list[str]:
    found = [
        f"Measured by {run.tool}: its prompts and machine are not known, nor whether the output is "
        "the target's; times count from when a request was sent"
    ]
    if not counted:
        found.append("Nobody counted drafts, so acceptance is not known")
    return found


def answer_of(
    sent: float,
    chunks: list[float],
    tokens: int,
    *,
    error: str | None = None,
    text: str = "",
    prompt_tokens: int | None = None,
) -> Answer:
    """One request, in seconds since the run began; one without a piece has failed."""
    if error is None and not chunks:
        error = "the answer had no tokens"
    return Answer(
        intended=sent,
        sent=sent,
        chunks=chunks,
        tokens=tokens,
        text=text,
        error=error,
        prompt_tokens=prompt_tokens,
    )
