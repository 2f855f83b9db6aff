"""Requests and answers become rows that capture reads, whole or streamed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.prompts.read import read_prompts
from bench.records.settings import PromptSettings
from drafts.errors import UserError
from serving.traffic.exchange import Exchange, row_of
from serving.traffic.redact import make_redactor, redacted

ASKED = {
    "model": "m", "messages": [{"role": "user", "content": "Hi"}], "temperature": 0, "user": "jo",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}], "stream": True,
}  # fmt: skip
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
METRICS = {
    "speculative_decoding": {
        "num_spec_steps": 7, "num_draft_tokens": 21, "acceptance_histogram": [3, 2, 1, 1],
        "mean_acceptance_length": 2.0,
    }
}  # fmt: skip


def exchange(asked: Any, *answer: Any, stream: bool = False, **more: Any) -> Exchange:
    made = Exchange("/v1/chat/completions", "2026-11-27T10:00:00+00:00", status=200, complete=True)
    made.request += json.dumps(asked).encode()
    if stream:
        made.response += b"".join(b"data: %s\n\n" % json.dumps(one).encode() for one in answer)
        made.response += b"data: [DONE]\n\n"
    else:
        made.response += json.dumps(answer[0]).encode()
    for name, value in more.items():
        setattr(made, name, value)
    return made


def pieces(*deltas: dict[str, Any], last: str = "stop") -> list[dict[str, Any]]:
    """A stream as vLLM sends it."""
    head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": "m"}
    found = [head | {"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    end = {"index": 0, "delta": {"content": ""}, "finish_reason": last, "stop_reason": None}
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    return [
        *found,
        head | {"choices": [end]},
        head | {"choices": [], "usage": usage, "metrics": METRICS},
    ]


def whole(message: dict[str, Any], last: str = "stop") -> dict[str, Any]:
    choice = {"index": 0, "message": message, "finish_reason": last, "stop_reason": None}
    usage = {"prompt_tokens": 3, "completion_tokens": 5}
    return {"id": "chatcmpl-1", "choices": [choice], "usage": usage, "metrics": METRICS}


@pytest.mark.parametrize(
    ("deltas", "message", "last"),
    [
        (
            [{"role": "assistant", "content": ""}, {"content": "Hel"}, {"content": "lo ü"}],
            {"role": "assistant", "content": "Hello ü"},
            "stop",
        ),
        (
            [
                {"role": "assistant", "content": "", "reasoning_content": None},
                {"reasoning_content": "hm"}, {"reasoning_content": "m"}, {"content": "So"},
            ],
            {"role": "assistant", "content": "So", "reasoning_content": "hmm"},
            "stop",
        ),
        (
            [
                {"role": "assistant", "content": ""},
                {"tool_calls": [{"index": 0, "id": "c1", "type": "function",
                                 "function": {"name": "f", "arguments": ""}}]},
                {"tool_calls": [{"index": 0, "function": {"arguments": '{"x":'}}]},
                {"tool_calls": [{"index": 0, "function": {"arguments": " 1}"}}]},
            ],
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            "tool_calls",
        ),
    ],
)  # fmt: skip
def test_a_stream_is_the_answer_that_it_makes(
    deltas: list[dict[str, Any]], message: dict[str, Any], last: str
) -> None:
    streamed = row_of(exchange(ASKED, *pieces(*deltas, last=last), stream=True))
    at_once = row_of(exchange(ASKED, whole(message, last)))
    assert streamed == at_once
    assert streamed is not None
    assert streamed["response"]["choices"][0]["message"] == message
    assert streamed["request"].keys() == {"model", "messages", "temperature", "tools"}
    assert streamed["acceptance"] == {
        "drafts": 7, "draft_tokens": 21, "histogram": [3, 2, 1, 1],
    }  # fmt: skip


def test_capture_reads_the_rows(tmp_path: Path) -> None:
    first = row_of(exchange(ASKED, whole({"role": "assistant", "content": "Hello"})))
    completion = {
        "id": "cmpl-1",
        "choices": [{"index": 0, "text": " four", "finish_reason": "length"}],
    }
    second = row_of(exchange({"model": "m", "prompt": "Two and two is"}, completion))
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (first, second)))
    prompts = read_prompts(str(file), PromptSettings())
    assert len(prompts) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"status": 400},
        {"complete": False},
        {"request": bytearray(b"{")},
        {"request": bytearray(b"[1]")},
        {"response": bytearray(b"data: {\n\n")},
        {"response": bytearray(b"<html>")},
        {"response": bytearray(b'{"error": {"message": "no"}}')},
    ],
)
def test_what_failed_is_no_row(change: dict[str, Any]) -> None:
    assert row_of(exchange(ASKED, whole({"role": "assistant", "content": "x"}), **change)) is None


def test_token_ids_in_place_of_texts() -> None:
    answer = whole({"role": "assistant", "content": "secret"})
    assert row_of(exchange(ASKED, answer), ids_only=True) is None
    answer["prompt_token_ids"], answer["choices"][0]["token_ids"] = [1, 2], [3, 4]
    row = row_of(exchange(ASKED, answer), ids_only=True)
    assert row is not None
    assert row["prompt_token_ids"] == [1, 2]
    assert row["response_token_ids"] == [3, 4]
    assert "secret" not in json.dumps(row)
    deltas = [{"role": "assistant", "content": ""}, {"content": "sec"}, {"content": "ret"}]
    streamed = pieces(*deltas)
    streamed[0]["prompt_token_ids"] = [1, 2]
    for piece, ids in zip(streamed[1:3], ([3], [4]), strict=True):
        piece["choices"][0]["token_ids"] = ids
    assert row_of(exchange(ASKED, *streamed, stream=True), ids_only=True) == row


def test_turns_of_one_conversation_have_one_root_without_its_text() -> None:
    answer = whole({"role": "assistant", "content": "secret"})
    answer["prompt_token_ids"], answer["choices"][0]["token_ids"] = [1, 2], [3, 4]

    def root(request: dict[str, Any]) -> str:
        row = row_of(exchange(request, answer), ids_only=True)
        assert row is not None
        return str(row["root"])

    first: list[dict[str, Any]] = [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "one"},
    ]
    more = [{"role": "assistant", "content": "secret"}, {"role": "user", "content": "two"}]
    other = [first[0], {"role": "user", "content": "three"}]
    assert root({"messages": first}) == root({"messages": first + more})
    assert root({"messages": first}) != root({"messages": other})
    assert root({"prompt": "one"}) != root({"prompt": "two"})


def shout(text: str) -> str:
    return text.upper()


def test_redaction_reaches_every_text() -> None:
    redact = make_redactor([r"[\w.]+@[\w.]+", r"\d{4,}"])
    assert redact is not None
    value = {"messages": [{"role": "user", "content": "me: a.b@c.de 12345"}], "n": 12345}
    said = redacted(value, redact)
    assert said["messages"][0]["content"] == "me: [redacted] [redacted]"
    assert said["n"] == 12345
    own = make_redactor([], f"{__name__}:shout")
    assert own is not None
    assert own("ab") == "AB"
    assert make_redactor([]) is None


@pytest.mark.parametrize(
    ("patterns", "function", "said"),
    [
        (["("], None, "no regular expression"),
        ([], "json:nothing", "cannot be imported"),
        ([], "no_such_module:f", "cannot be imported"),
        ([], "json:loads", "empty text"),
        ([], "json", "cannot be imported"),
    ],
)
def test_what_cannot_redact_is_refused(
    patterns: list[str], function: str | None, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        make_redactor(patterns, function)
