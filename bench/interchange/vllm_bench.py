"""The JSON of `vllm bench serve --save-result --save-detailed`.

Source: vllm/benchmarks/serve.py (0.26 to 0.32): arrays with one entry a request (`ttfts`, `itls`
between pieces, `output_lens`, `start_times` on the client's clock, all in seconds), and the
growth of the server's counters as `spec_decode_*` where it speculated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from bench.interchange.foreign import ForeignRun, Measured, answer_of, require
from bench.records.run import Answer, Block
from bench.server.arrivals import Load
from serving.metrics import SpecCounters

TOOL = "vllm bench serve"
BY_REQUEST = ("ttfts", "itls", "output_lens", "start_times")
KEPT = (
    "backend", "tokenizer_id", "burstiness", "label", "max_concurrency", "ramp_up_strategy",
)  # fmt: skip
PERCENTILE = 99

Json = dict[str, Any]


def is_one(content: Any) -> bool:
    """Whether this is what the tool writes."""
    names = ("model_id", "request_throughput", "max_concurrency")
    return isinstance(content, dict) and all(name in content for name in names)


def read(content: Json, path: Path) -> ForeignRun:
    """The run. Raises `UserError` for one that kept no times by request."""
    missing = [name for name in BY_REQUEST if name not in content]
    require(
        not missing,
        path,
        f"{TOOL} kept no times by request here (no {', '.join(missing)}), and means alone have no "
        "intervals",
        "measure with --save-detailed",
    )
    count = len(content["ttfts"])
    require(
        all(len(content[name]) == count for name in BY_REQUEST) and count > 0,
        path,
        f"{', '.join(BY_REQUEST)} have {[len(content[name]) for name in BY_REQUEST]} entries",
        "give a file as the tool wrote it",
    )
    errors = content.get("errors") or [""] * count
    texts = content.get("generated_texts") or [""] * count
    inputs = content.get("input_lens") or [None] * count
    begin = min(content["start_times"])
    answers = []
    for place in range(count):
        sent = content["start_times"][place] - begin
        gaps = content["itls"][place]
        chunks = list(accumulate(gaps, initial=sent + content["ttfts"][place]))
        failed = errors[place] or None
        answers.append(
            answer_of(
                sent,
                [] if failed else chunks,
                content["output_lens"][place],
                error=failed,
                text=texts[place],
                prompt_tokens=inputs[place],
            )
        )
    block = Block(content["duration"], 0.0, answers)
    settings = {name: content[name] for name in KEPT if content.get(name) is not None}
    measured = Measured(_load(content), block, _speculation(content))
    begun = datetime.strptime(content["date"], "%Y%m%d-%H%M%S") if content.get("date") else None
    return ForeignRun(TOOL, path, content["model_id"], [measured], begun, settings)


def _load(content: Json) -> Load:
    rate = float(content["request_rate"])
    if math.isinf(rate) and content["max_concurrency"]:
        return Load(concurrency=content["max_concurrency"])
    return Load(rate=rate)


def _speculation(content: Json) -> SpecCounters | None:
    """None where the tool saw no drafts, as of a server without them or without /metrics."""
    drafts = content.get("spec_decode_num_drafts")
    if not drafts:
        return None
    rates = content.get("spec_decode_per_position_acceptance_rates") or []
    return SpecCounters(
        drafts,
        content["spec_decode_draft_tokens"],
        content["spec_decode_accepted_tokens"],
        tuple(round(rate * drafts) for rate in rates),
    )


def write(
    load: Load, blocks: Sequence[Block], speculation: SpecCounters | None, model: str
) -> Json:
    """The content of the tool's file for one arm at one load; all its rounds in one."""
    offsets = list(accumulate((block.wall_seconds for block in blocks), initial=0.0))[:-1]
    placed = [
        (at, answer) for at, block in zip(offsets, blocks, strict=True) for answer in block.answers
    ]
    good = [answer for _, answer in placed if answer.error is None]
    seconds = sum(block.wall_seconds for block in blocks)
    inputs, outputs = (sum(values) for values in (
        [answer.prompt_tokens or 0 for answer in good], [answer.tokens for answer in good]
    ))  # fmt: skip
    content: Json = {
        "backend": "openai",
        "model_id": model,
        "num_prompts": len(placed),
        "request_rate": "inf" if load.rate is None or math.isinf(load.rate) else load.rate,
        "burstiness": 1.0,
        "max_concurrency": load.concurrency,
        "duration": seconds,
        "completed": len(good),
        "failed": len(placed) - len(good),
        "total_input_tokens": inputs,
        "total_output_tokens": outputs,
        "request_throughput": len(good) / seconds,
        "output_throughput": outputs / seconds,
        "total_token_throughput": (inputs + outputs) / seconds,
        "input_lens": [answer.prompt_tokens or 0 for _, answer in placed],
        "output_lens": [answer.tokens for _, answer in placed],
        "ttfts": [_ttft(answer) for _, answer in placed],
        "itls": [np.diff(answer.chunks).tolist() for _, answer in placed],
        "start_times": [at + answer.sent for at, answer in placed],
        "generated_texts": [answer.text for _, answer in placed],
        "errors": [answer.error or "" for _, answer in placed],
    }
    tpots = [(a.chunks[-1] - a.chunks[0]) / (a.tokens - 1) for a in good if a.tokens > 1]
    itls = [gap for answer in good for gap in np.diff(answer.chunks)]
    for name, values in (("ttft", [_ttft(a) for a in good]), ("tpot", tpots), ("itl", itls)):
        content |= _spread(name, values)
    if speculation is not None and speculation.drafts:
        content |= _counted(speculation)
    return content


def _ttft(answer: Answer) -> float:
    return answer.chunks[0] - answer.sent if len(answer.chunks) else 0.0


def _spread(name: str, seconds: Sequence[float]) -> Json:
    values = 1000 * np.array(seconds if len(seconds) else [0.0])
    return {
        f"mean_{name}_ms": float(values.mean()),
        f"median_{name}_ms": float(np.median(values)),
        f"std_{name}_ms": float(values.std()),
        f"p{PERCENTILE}_{name}_ms": float(np.percentile(values, PERCENTILE)),
    }


def _counted(spent: SpecCounters) -> Json:
    return {
        "spec_decode_acceptance_rate": 100 * spent.accepted_tokens / max(1, spent.draft_tokens),
        "spec_decode_acceptance_length": 1 + spent.accepted_tokens / spent.drafts,
        "spec_decode_num_drafts": spent.drafts,
        "spec_decode_draft_tokens": spent.draft_tokens,
        "spec_decode_accepted_tokens": spent.accepted_tokens,
        "spec_decode_per_position_acceptance_rates": [
            accepted / spent.drafts for accepted in spent.accepted_per_position
        ],
    }
