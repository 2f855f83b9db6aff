"""Logged requests and responses of OpenAI's API, which vLLM's servers speak as well."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.prompts.formats.faults import kind_of, wrong
from bench.prompts.formats.messages import parsed

REQUESTS, REPLIES = ("body", "request"), ("response", "choices")
ASKED = ("messages", "conversations", "conversation", "prompt")
# A server's own words for an answer that had no end of its own.
CUT = ("length", "max_tokens", "content_filter", "abort")
# What changes the text that the model sees, in a way that nothing here does as well.
REFUSED = ("documents", "chat_template", "continue_final_message", "suffix", "echo")


def unwrapped(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row that a logged request and its response say together; other rows as they are.

    The request's fields stand in the row itself, `response` is the answer (a message, or the text
    of a completion), and `finish_reason` says how it ended. Of several choices the first counts.
    Raises `UserError` for a failed request, and for an answer without its request.
    """
    of_requests, of_replies = (*ASKED, "body"), ("choices", "body", "role", "error")
    requests = [_object(row.get(name), of_requests) for name in REQUESTS]
    request = next((found for found in requests if found is not None), None)
    reply = _object(row.get("response"), of_replies)
    inner = _object((reply or {}).get("body"), ("choices",)) or {}
    choices = (reply or row).get("choices") or inner.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if request is None and reply is None and not isinstance(choice, dict):
        return row
    flat = {name: value for name, value in row.items() if name not in (*REQUESTS, *REPLIES)}
    if request is not None:
        flat |= _object(request.get("body"), ASKED) or request
    if reply is None and choice is None and row.get("response") is not None:
        flat["response"] = row["response"]
    failed = [row.get("error"), (reply or {}).get("error"), _status(reply)]
    if any(failed):
        raise wrong("its request failed", "an answer, or the request alone", where)
    if isinstance(choice, dict):
        flat |= _answer(choice, where)
    elif reply is not None:
        if not isinstance(reply.get("role"), str):
            keys = ", ".join(sorted(reply))
            raise wrong(f'"response" has {keys}', "choices, a message or text", where)
        flat["response"] = reply
    if not any(flat.get(name) for name in ASKED):
        raise wrong("holds an answer without its request", "messages or a prompt beside it", where)
    return flat


def refuse_unread(row: dict[str, Any], where: str) -> None:
    """Raise `UserError` for a request's fields that change the prompt and are not followed."""
    for name in REFUSED:
        if row.get(name):
            raise wrong(f'has "{name}"', "a prompt that its messages say alone", where)


def template_kwargs(row: dict[str, Any], where: str) -> dict[str, Any] | None:
    """What the row says to the chat template, as vLLM would hand it on; None for nothing."""
    given = parsed(row.get("chat_template_kwargs"))
    if given is not None and not isinstance(given, dict):
        raise wrong(f'"chat_template_kwargs" is {kind_of(given)}', "an object", where)
    effort = row.get("reasoning_effort")
    return {**(given or {}), **({"reasoning_effort": effort} if effort else {})} or None


def is_cut(row: dict[str, Any]) -> bool:
    """Whether the row's answer was ended by a limit or a stop text, not by the model."""
    return row.get("finish_reason") in CUT or isinstance(row.get("stop_reason"), str)


def _answer(choice: dict[str, Any], where: str) -> dict[str, Any]:
    answer = choice.get("message") or choice.get("text")
    if not answer:
        keys = ", ".join(sorted(choice))
        raise wrong(f"its answer has {keys}", "a message or a text that is not empty", where)
    if isinstance(answer, dict) and answer.get("refusal"):
        answer = {**answer, "content": answer.get("content") or answer["refusal"]}
    ended = ("finish_reason", "stop_reason")
    return {"response": answer, **{name: choice.get(name) for name in ended}}


def _status(reply: dict[str, Any] | None) -> bool:
    status = (reply or {}).get("status_code")
    return isinstance(status, int) and status >= 400


def _object(value: Any, names: Sequence[str]) -> dict[str, Any] | None:
    """`value` where it is an object with one of `names`, or JSON text of one; else None."""
    value = parsed(value)
    return value if isinstance(value, dict) and not value.keys().isdisjoint(names) else None
