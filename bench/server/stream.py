"""What came back for one request, and the answer that it makes up: read after the last request.

An answer is a stream of server-sent events. Servers differ in what they put there, so each rule
here is about what a piece shows and not about where it stands: a piece has tokens if it shows text
of any kind, token ids, or a token count that grew; usage counts wherever it comes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.records.run import Answer
from serving.metrics import SpecCounters, counters_from_histogram

# Of a chat delta: the fields that hold what the model wrote. A role is none of them.
WRITTEN = ("reasoning_content", "reasoning", "content", "refusal", "tool_calls", "function_call")
REASONING = WRITTEN[:2]
TYPED = ("text", "thinking", "arguments", "name")  # where nested parts keep their text
BROKEN = ("abort", "error")  # finish reasons of answers that are none
SHOWN = 300  # characters of a strange answer that an error shows


@dataclass
class RawAnswer:
    """An answer as it arrived: times by `perf_counter`, and its body read by read."""

    intended: float
    sent: float = 0.0
    kind: str = ""  # of the body: its content type
    reads: list[tuple[float, bytes]] = field(default_factory=list)
    error: str | None = None
    retried: int = 0


@dataclass
class _Found:
    """What the events read so far have shown."""

    chunks: list[float] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    ids: list[int] | None = None
    tokens: int | None = None
    prompt_tokens: int | None = None
    counters: SpecCounters | None = None
    ended: bool = False
    finished: float | None = None  # when the piece with the finish reason came
    answered: float | None = None  # when the first piece of the answer came, behind the reasoning
    error: str | None = None


def read_answer(raw: RawAnswer, start: float) -> Answer:
    """The answer that the reads make up, with times from `start`.

    An answer without usage has `tokens` only where its token ids came; else they are 0, and
    `counted_by` is None until somebody counts them.
    """
    found = _Found(error=raw.error)
    events = 0
    for moment, name, content in sse_events(raw.reads):
        events += 1
        if content == "[DONE]":
            found.ended = True
        else:
            _take(found, moment - start, name, content)
    if found.error is None and not events and raw.reads:
        found.error = f"answered with {raw.kind or 'something'} and no events: {_beginning(raw)}"
    if not found.chunks and found.tokens and found.finished is not None:
        found.chunks = [found.finished]  # nothing but an end token, which no piece shows
    if found.error is None and not (found.ended and found.chunks):
        found.error = "the answer ended early" if found.chunks else "the answer had no tokens"
    return Answer(
        intended=raw.intended - start,
        sent=raw.sent - start,
        chunks=found.chunks,
        tokens=found.tokens or len(found.ids or []),
        text="".join(found.texts),
        token_ids=found.ids,
        counters=found.counters,
        error=found.error,
        prompt_tokens=found.prompt_tokens,
        counted_by="usage" if found.tokens else "ids" if found.ids else None,
        answered=found.answered,
        retried=raw.retried,
    )


def sse_events(reads: list[tuple[float, bytes]]) -> Iterator[tuple[float, str, str]]:
    """When each event was whole, its name ("" for most) and its data; comments are left out.

    By the rules of the HTML standard for event streams (lines end with LF, CRLF or CR; several
    `data:` lines are joined), but that an event counts too where the stream ends without the empty
    line after it.
    """
    rest, name, data = b"", "", list[str]()
    moment = 0.0
    for moment, piece in [*reads, (reads[-1][0] if reads else 0.0, b"\n\n")]:
        rest += piece
        lines = rest.replace(b"\r\n", b"\n")
        held = b"\r" if lines.endswith(b"\r") else b""  # the LF of a CRLF may come with the next
        *whole, rest = lines.removesuffix(held).replace(b"\r", b"\n").split(b"\n")
        rest += held
        for line in whole:
            field_name, _, value = (
                line.decode(errors="replace").removeprefix("\ufeff").partition(":")
            )
            if not line:
                if data:
                    yield moment, name, "\n".join(data).strip()
                name, data = "", []
            elif field_name == "data":
                data.append(value.removeprefix(" "))
            elif field_name == "event":
                name = value.strip()


def _take(found: _Found, moment: float, name: str, content: str) -> None:
    """Add what one event shows."""
    try:
        data = json.loads(content)
    except ValueError:
        found.error = found.error or f"an event is no JSON: {content[:SHOWN]}"
        return
    if not isinstance(data, dict):
        return
    if data.get("error") or name == "error":
        found.error = found.error or str(data.get("error") or data)[:SHOWN]
        return
    before = found.tokens or 0
    _take_usage(found, data.get("usage"))
    found.counters = _counters(data) or found.counters
    choices = data.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return
    choice = choices[0]
    delta = choice.get("delta")
    parts = {key: list(_texts((delta or {}).get(key))) for key in WRITTEN}
    plain = list(_texts(choice.get("text")))
    texts = [*plain, *(text for found_texts in parts.values() for text in found_texts)]
    answers = any(any(found_texts) for key, found_texts in parts.items() if key not in REASONING)
    if found.answered is None and (any(plain) or answers):
        found.answered = moment
    ids = choice.get("token_ids")
    if ids is not None:
        found.ids = [*(found.ids or []), *ids]
    reason = choice.get("finish_reason")
    # A usage that grows from piece to piece counts the tokens so far. The first one may come with
    # the finish reason; then it counts the whole answer and says nothing of this piece.
    grown = (found.tokens or 0) > before and (before > 0 or not reason)
    if any(texts) or ids or grown:
        found.chunks.append(moment)
        found.texts += texts
    if reason:
        found.ended, found.finished = True, moment
        if reason in BROKEN:
            found.error = found.error or f"the server ended it with finish_reason {reason!r}"


def _take_usage(found: _Found, usage: Any) -> None:
    if not isinstance(usage, dict):
        return
    for key, name in (("completion_tokens", "tokens"), ("prompt_tokens", "prompt_tokens")):
        count = usage.get(key)
        if isinstance(count, int) and not isinstance(count, bool) and count > 0:
            setattr(found, name, count)


def _texts(part: Any) -> Iterator[str]:
    """The texts in a field of a delta: itself, or those of its parts."""
    if isinstance(part, str):
        yield part
    elif isinstance(part, list):
        for one in part:
            yield from _texts(one)
    elif isinstance(part, Mapping):
        for key in (*TYPED, "function"):
            yield from _texts(part.get(key))


def _counters(data: Mapping[str, Any]) -> SpecCounters | None:
    """What `--per-request-spec-decode-metrics` adds to an answer's last message."""
    metrics = data.get("metrics")
    found = metrics.get("speculative_decoding") if isinstance(metrics, dict) else None
    if not found:
        return None
    return counters_from_histogram(found["acceptance_histogram"], found["num_draft_tokens"])


def _beginning(raw: RawAnswer) -> str:
    text = b"".join(data for _, data in raw.reads).decode(errors="replace")
    return " ".join(text.split())[:SHOWN]
