"""A request and its answer as one row: what `afaspec capture` reads as a log.

    {"id", "time", "route", "tag", "draft_version", "request": {...}, "response": {...},
     "acceptance": {"drafts", "draft_tokens", "histogram"}}

With token ids in place of texts, "root", "prompt_token_ids" and "response_token_ids" stand there
instead of request and response.

`tag` is what the request's header says of itself (tenant, language, task). `acceptance` is there
where vLLM counts per request; entry j of the histogram counts the steps that kept j drafted tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

Json = dict[str, Any]
ROUTES = ("/v1/chat/completions", "/v1/completions")
TAG, OPT_OUT = "x-afaspec-tag", "x-afaspec-collect"  # headers; `no` in the second opts out
LONGEST_TAG = 64
# Of a request, what is of no use later, or is a secret of its client's.
LEFT_OUT = ("stream", "stream_options", "user", "metadata", "safety_identifier", "prompt_cache_key")
IDS = ("prompt_token_ids", "token_ids")  # as vLLM names them in an answer


@dataclass
class Exchange:
    """The bytes of one request and its answer, as they passed by."""

    route: str
    time: str
    tag: str | None = None
    draft_version: str | None = None
    status: int = 0
    request: bytearray = field(default_factory=bytearray)
    response: bytearray = field(default_factory=bytearray)
    complete: bool = False


def row_of(exchange: Exchange, *, ids_only: bool = False) -> Json | None:
    """The row; None for what cannot be learned from: a failed, cut off or unreadable one.

    `ids_only` keeps token ids in place of texts; None then for an answer that has none.
    """
    if exchange.status != 200 or not exchange.complete:
        return None
    try:
        request, response = json.loads(exchange.request), _response(bytes(exchange.response))
    except (ValueError, KeyError, TypeError, IndexError):
        return None
    if not isinstance(request, dict) or not response.get("choices"):
        return None
    row: Json = {"id": response.get("id"), "time": exchange.time, "route": exchange.route}
    if exchange.tag:
        row["tag"] = exchange.tag[:LONGEST_TAG]
    if exchange.draft_version:
        row["draft_version"] = int(exchange.draft_version)
    if ids_only:
        ids = token_ids(response)
        if ids is None:
            return None
        row |= {"root": _root(request), **ids}
    else:
        row["request"] = {k: v for k, v in request.items() if k not in LEFT_OUT}
        row["response"] = {"choices": [_plain(one) for one in response["choices"]]}
    if response.get("usage"):
        row["usage"] = response["usage"]
    if acceptance := _acceptance(response):
        row["acceptance"] = acceptance
    return row


def _root(request: Json) -> str:
    """A hash of where a conversation begins, its messages up to the user's first: alike for all its
    turns, so that they come on one side of a split."""
    said: Any = request.get("prompt")
    if messages := request.get("messages"):
        users = (i for i, message in enumerate(messages) if message.get("role") == "user")
        said = [
            (message.get("role"), message.get("content"))
            for message in messages[: next(users, 0) + 1]
        ]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def token_ids(response: Json) -> Json | None:
    """Prompt and answer as vLLM's token ids; None where the answer has none, or more than one."""
    choices = response["choices"]
    prompt = response.get(IDS[0]) or choices[0].get(IDS[0])
    answer = choices[0].get(IDS[1])
    if len(choices) != 1 or not prompt or not answer:
        return None
    return {"prompt_token_ids": prompt, "response_token_ids": answer}


def _response(body: bytes) -> Json:
    """The answer as one object, put together where it came in pieces."""
    if not body.lstrip().startswith(b"data:"):
        whole: Json = json.loads(body)
        return whole
    joined: Json = {}
    choices: dict[int, Json] = {}
    for piece in _pieces(body):
        joined |= {k: v for k, v in piece.items() if k != "choices" and v is not None}
        for choice in piece.get("choices") or []:
            _join(choices.setdefault(choice["index"], {"index": choice["index"]}), choice)
    joined["choices"] = [choices[index] for index in sorted(choices)]
    return joined


def _pieces(body: bytes) -> Iterator[Json]:
    for line in body.splitlines():
        if line.startswith(b"data:") and (data := line[5:].strip()) != b"[DONE]":
            yield json.loads(data)


def _join(whole: Json, piece: Json) -> None:
    """Add a streamed piece of a choice to what came before."""
    for name, value in piece.items():
        if name == "delta":
            message = whole.setdefault("message", {})
            for key, part in (value or {}).items():
                _add(message, key, part)
        elif name in ("text", IDS[1]):
            _add(whole, name, value)
        elif value is not None:
            whole[name] = value


def _add(whole: Json, name: str, part: Any) -> None:
    """Texts and lists grow; calls of tools grow by their index; the rest is what came last."""
    if part is None:
        whole.setdefault(name, None)
    elif name == "role":
        whole[name] = part
    elif name == "tool_calls":
        calls: list[Json] = whole.get(name) or []
        whole[name] = calls
        for call in part:
            place = call.get("index", len(calls))
            while len(calls) <= place:
                calls.append({"function": {"arguments": ""}})
            function = call.get("function") or {}
            calls[place] |= {k: v for k, v in call.items() if k not in ("index", "function")}
            calls[place]["function"]["arguments"] += function.get("arguments") or ""
            if function.get("name"):
                calls[place]["function"]["name"] = function["name"]
    elif isinstance(part, str | list) and isinstance(whole.get(name), type(part)):
        whole[name] += part
    else:
        whole[name] = part


def _plain(choice: Json) -> Json:
    """A choice without what is large, and without what is not said (a stream leaves that out)."""
    large = (*IDS, "logprobs", "prompt_logprobs")
    plain = {k: v for k, v in choice.items() if k not in large and v is not None}
    if isinstance(message := plain.get("message"), dict):
        plain["message"] = {k: v for k, v in message.items() if v is not None}
    return plain


def _acceptance(response: Json) -> Json | None:
    counted = (response.get("metrics") or {}).get("speculative_decoding")
    if not counted:
        return None
    return {
        "drafts": counted["num_spec_steps"],
        "draft_tokens": counted["num_draft_tokens"],
        "histogram": counted["acceptance_histogram"],
    }
