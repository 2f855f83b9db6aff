"""Prompts as requests to a server: token ids where a tokenizer is at hand, else text or chat."""

from __future__ import annotations

import hashlib
import json
import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.prompts.load import conversations, distinct, load_prompts
from bench.prompts.rows import Message, Prompt
from bench.records.progress import Note
from bench.server.client import Job
from bench.server.config import OMITTABLE, ServerConfig
from drafts.errors import UserError
from drafts.target.info import TargetInfo
from serving.remote import RemoteServer
from serving.sampling import NEUTRAL

PROBE = "def add(a, b):\n    return a + b  # 3.14 żółć 語\n"  # no two tokenizers cut this alike
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@dataclass(frozen=True)
class Request:
    """What to ask: token ids or text of a `prompt`, or the `messages` of a conversation.

    `tools` and `template_kwargs` go with messages, for the server's chat template.
    """

    id: str
    prompt: list[int] | str | None = None
    messages: list[Message] | None = None
    category: str | None = None
    tools: list[dict[str, Any]] | None = None
    template_kwargs: dict[str, Any] | None = None
    root: int | None = None  # the prompt's own

    @property
    def content(self) -> dict[str, Any]:
        """Its part of a request's body."""
        if not self.messages:
            return {"prompt": self.prompt}
        told = {"tools": self.tools, "chat_template_kwargs": self.template_kwargs}
        return {"messages": self.messages, **{name: given for name, given in told.items() if given}}


def load_requests(
    config: ServerConfig, server: RemoteServer | None, k: int, note: Note | None = None
) -> list[Request]:
    """The prompts of `config` as requests, named apart. `k` more tokens fit behind each answer.

    `server` cuts passages of plain text to their first tokens where there is no target to do it.
    Of a conversation only its first turn is asked. Raises `UserError` for what cannot be used.
    """
    if config.target is not None:
        encoded = load_prompts(config.in_process(config.target, k), note)
        requests = [Request(p.id, p.input_ids, category=p.category, root=p.root) for p in encoded]
    else:
        told = config.chat_template_kwargs
        found = conversations(config, config.prompts, note)
        requests = [
            replace(_as_request(prompt, server, told), root=prompt.root) for prompt in found
        ]
    names = distinct([request.id for request in requests])
    return [replace(request, id=name) for request, name in zip(requests, names, strict=True)]


def _as_request(
    prompt: Prompt, server: RemoteServer | None, template_kwargs: dict[str, Any]
) -> Request:
    if prompt.messages is not None:
        return Request(
            prompt.id,
            messages=prompt.messages,
            category=prompt.category,
            tools=prompt.tools,
            template_kwargs={**template_kwargs, **(prompt.template_kwargs or {})},
        )
    if prompt.ids is not None:
        return Request(prompt.id, list(prompt.ids), category=prompt.category)
    text = prompt.text or ""
    if prompt.head_tokens is None:
        return Request(prompt.id, text, category=prompt.category)
    ids = server.tokenize(prompt=text) if server else None
    if ids is None:
        raise UserError(
            "is plain text to be cut to its first tokens, and the server does not tokenise",
            where=prompt.id,
            hint="give TARGET, the folder of the model that the servers serve",
        )
    return Request(prompt.id, ids[: prompt.head_tokens], category=prompt.category)


def make_job(request: Request, config: ServerConfig, model: str, seed: int = 0) -> Job:
    """The streamed request for a server that serves `model`, less the fields to be left out.

    Sampling is stated whole, or the server would fill it in from the target's own settings. Unless
    prefixes are to be reused, a salt of its own keeps the request from finding its prompt in the
    server's prefix cache. `seed` is its own, where requests are to have one.
    """
    omitted = config.omitted
    newer = request.messages and "max_completion_tokens" not in omitted
    body: dict[str, Any] = {
        "model": model,
        **request.content,
        "max_completion_tokens" if newer else "max_tokens": config.max_tokens,
        "stream": True,
    }
    optional: dict[str, Any] = {
        "temperature": config.temperature,
        **NEUTRAL,
        "stream_options": {"include_usage": True},
    }
    if config.ignore_eos:
        optional["ignore_eos"] = True
    if config.token_ids:
        optional["return_token_ids"] = True
    if not config.reuse_prefixes:
        optional["cache_salt"] = uuid.uuid4().hex
    if config.request_seeds:
        optional["seed"] = seed
    body |= {name: value for name, value in optional.items() if name not in omitted}
    body |= config.request_body
    return Job(CHAT if request.messages else COMPLETIONS, json.dumps(body).encode())


def refused_fields(job: Job, error: str) -> list[str]:
    """The fields of a request that the server's refusal names and that it can do without."""
    if not re.match(r"HTTP 4\d\d", error):
        return []
    sent = json.loads(job.body)
    return [name for name in OMITTABLE if name in sent and re.search(rf"\b{name}\b", error)]


def content_hash(requests: Sequence[Request]) -> str:
    """SHA-256 of what is asked, in its order; of token ids the same as for engines in process."""
    contents = [request.content if request.messages else request.prompt for request in requests]
    return hashlib.sha256(json.dumps(contents).encode()).hexdigest()


def require_same_model(servers: Mapping[str, RemoteServer], target: TargetInfo | None) -> None:
    """Raise `UserError` where a server tokenises otherwise than `target`, or than the others.

    Servers without /tokenize are taken at their word.
    """
    expected, whose = None, ""
    if target is not None:
        from transformers import AutoTokenizer

        tokenizer, whose = AutoTokenizer.from_pretrained(target.folder), str(target.folder)
        expected = list(tokenizer(PROBE)["input_ids"])
    for name, server in servers.items():
        found = server.tokenize(prompt=PROBE)
        if expected is None:
            expected, whose = found, f"the server {name!r}"
        elif found is not None and found != expected:
            raise UserError(
                f"the server {name!r} serves {server.root}, whose tokens are not those of {whose}",
                where=server.url,
                hint="give the target that the servers serve; all arms must serve the same one",
            )
