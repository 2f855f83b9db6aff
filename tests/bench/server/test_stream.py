"""What streams hold and what is made of it, with made-up arrival times."""

from __future__ import annotations

import json
from typing import Any

import pytest

from bench.records.run import Answer
from bench.server.stream import RawAnswer, read_answer, sse_events

DONE = b"data: [DONE]\n\n"


def event(choice: dict[str, Any] | None = None, **more: Any) -> bytes:
    data = {"choices": [choice] if choice else [], **more}
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"index": 0, "delta": fields, "finish_reason": finish}


def usage(tokens: Any) -> dict[str, Any]:
    return {"usage": {"prompt_tokens": 9, "completion_tokens": tokens}}


def answer(*pieces: bytes, kind: str = "text/event-stream") -> Answer:
    """Of pieces that came 1, 2, 3 ... seconds after it was sent."""
    reads = [(101.0 + place, piece) for place, piece in enumerate(pieces)]
    return read_answer(RawAnswer(100.0, 100.0, kind, reads), 100.0)


ROLE = event(delta(role="assistant", content=""))
END = event(delta("stop"))


@pytest.mark.parametrize(
    "fields",
    [
        {"content": "a"},
        {"reasoning": "a"},
        {"reasoning_content": "a", "content": None},
        {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "a"}]}]},
        {"tool_calls": [{"index": 0, "id": "x", "function": {"name": "a", "arguments": ""}}]},
    ],
)
def test_ttft_is_the_first_token_of_whatever_kind(fields: dict[str, Any]) -> None:
    empty = event(delta(content="", tool_calls=[], reasoning=None))
    found = answer(ROLE, empty, event(delta(**fields)), END, event(**usage(1)), DONE)
    assert (found.error, found.ttft, found.e2e, found.text) == (None, 3.0, 3.0, "a")


@pytest.mark.parametrize(
    ("pieces", "tokens"),
    [
        ([event(delta(content="a")), event(delta("length")), event(**usage(6)), DONE], 6),
        ([event(delta(content="a")), event(delta("length"), **usage(6)), DONE], 6),
        ([event(delta(content="a"), **usage(4)), event(delta("length"), **usage(6)), DONE], 6),
        ([event(delta(content="a"), usage=None), event(delta("length"), **usage(6)), DONE], 6),
        ([event(delta(content="a")), DONE, event(**usage(6))], 6),
        ([event(delta(content="a")), END, event(**usage(0)), DONE], 0),
        ([event(delta(content="a")), END, event(**usage(None)), DONE], 0),
        ([event(delta(content="a")), END, DONE], 0),
    ],
)
def test_usage_counts_wherever_it_stands(pieces: list[bytes], tokens: int) -> None:
    found = answer(ROLE, *pieces)
    assert (found.error, found.tokens, found.ttft) == (None, tokens, 2.0)
    assert found.counted_by == ("usage" if tokens else None)


def test_token_ids_count_where_usage_does_not_come() -> None:
    pieces = [{"text": "", "token_ids": [5]}, {"text": "ż", "token_ids": [6, 7]}]
    found = answer(*map(event, pieces), event({"text": "", "finish_reason": "stop"}), DONE)
    assert (found.tokens, found.counted_by, list(found.token_ids or [])) == (3, "ids", [5, 6, 7])
    assert list(found.chunks) == [1.0, 2.0]  # half a character is a token that came


def test_usage_that_grows_shows_tokens_without_text() -> None:
    pieces = [event(delta(content=""), **usage(n)) for n in (0, 1, 1, 3)]
    found = answer(ROLE, *pieces, event(delta("stop"), **usage(4)), event(**usage(4)), DONE)
    assert (found.tokens, list(found.chunks)) == (4, [3.0, 5.0, 6.0])


def test_an_answer_of_an_end_token_alone() -> None:
    found = answer(ROLE, END, event(**usage(1)), DONE)
    assert (found.error, found.tokens, list(found.chunks)) == (None, 1, [2.0])


@pytest.mark.parametrize(
    ("pieces", "said"),
    [
        ([event(error={"message": "out of memory"}), DONE], "out of memory"),
        ([event(delta(content="a")), b'data: {"error": "worker died"}\n\n', DONE], "worker died"),
        ([b'event: error\ndata: {"message": "no"}\n\n', DONE], "no"),
        ([event(delta(content="a")), event(delta("abort")), DONE], "finish_reason 'abort'"),
        ([event(delta(content="a"))], "ended early"),
        ([event(delta(content="a"))[:-9]], "is no JSON"),
        ([ROLE, END, DONE], "no tokens"),
        ([b": ping\n\n", DONE], "no tokens"),
        ([b"data: <html>\n\n", DONE], "is no JSON: <html>"),
        ([b"data: [1, 2]\n\ndata: null\n\n", DONE], "no tokens"),
        ([b"<html>\n<p>wait</p>"], "answered with text/event-stream and no events: <html> <p>"),
        ([b'{"choices": [{"text": "whole"}]}'], "and no events"),
    ],
)
def test_what_is_no_answer_says_why(pieces: list[bytes], said: str) -> None:
    assert said in (answer(*pieces).error or "")


def test_an_error_that_is_null_is_none() -> None:
    assert answer(event(delta(content="a"), error=None, **usage(1)), DONE).error is None


def test_a_stream_that_ends_with_its_finish_reason_is_whole() -> None:
    found = answer(event(delta(content="a"), **usage(1)), END.removesuffix(b"\n\n"))
    assert (found.error, found.tokens) == (None, 1)


STREAM = (
    b": ping\r\n\r\nevent: message\nid: 4\ndata: one\n\n:x\ndata:two\ndata: lines\n\n"
    b"data: \xc5\xbc\r\n\r\nretry: 5\n\ndata: cr\r\rdata: last"
)
EVENTS = [("message", "one"), ("", "two\nlines"), ("", "ż"), ("", "cr"), ("", "last")]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_events_are_read_whole_wherever_reads_cut_them(size: int) -> None:
    reads = [(float(at), STREAM[at : at + size]) for at in range(0, len(STREAM), size)]
    found = list(sse_events(reads))
    assert [(name, data) for _, name, data in found] == EVENTS
    if size == 1:  # an event's time is that of the byte that ended it
        assert found[0][0] == STREAM.index(b"one\n\n") + 4
    assert list(sse_events([])) == []
