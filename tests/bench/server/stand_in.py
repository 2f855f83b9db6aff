"""A server of the OpenAI API that answers as servers in the world do: role pieces, reasoning, usage
in odd places, fields that it does not take, pages of HTML, a prefix before its paths."""

from __future__ import annotations

import asyncio
import json
import ssl
from dataclasses import dataclass, field
from typing import Any, Literal

from tests.bench.server.sse_server import SseServer, Stream

FIRST, NEXT = 0.2, 0.05  # seconds until the first token, and between pieces
PIECES = ("one", " two thr", "ee ż")  # of 6 tokens, not in the same pieces
TOKENS = 6
KNOWN = {
    "model", "messages", "prompt", "max_tokens", "max_completion_tokens", "temperature", "stream",
    "stream_options", "seed", "stop",
}  # fmt: skip
HTML = "<!DOCTYPE html><html><head><title>Hello</title></head><body>\n<p>ż</p></body></html>"


@dataclass
class StandIn:
    """How it answers. `html` are paths that show a page, `pages` what others show instead."""

    usage: Literal["own", "last", "each", "none"] = "own"
    writes_to: str = "content"
    strict: bool = False
    html: tuple[str, ...] = ()
    prefix: str = ""
    tokenizes: bool = True
    counted: bool = True
    refuses: int = 0  # requests, before it takes any
    reasons: bool = False  # the first piece is reasoning
    accepts: list[int] | None = None  # the histogram that each answer brings
    headers: list[dict[str, str]] = field(default_factory=list)
    pages: dict[str, str] = field(default_factory=dict)
    asked: list[dict[str, Any]] = field(default_factory=list)

    def serve(self, port: int = 0, context: ssl.SSLContext | None = None) -> SseServer:
        return SseServer(self.answer, self.page, port, context)

    async def page(self, stream: Stream) -> None:
        path = stream.path.removeprefix(self.prefix)
        if self.prefix and not stream.path.startswith(self.prefix):
            await stream.whole(HTML, "text/html", 404)
        elif path in self.html:
            await stream.whole(HTML, "text/html")
        elif path in self.pages:
            await stream.whole(self.pages[path])
        elif path == "/v1/models":
            await stream.whole(json.dumps({"data": [
                {"id": "mine", "root": "mine", "max_model_len": 512},
                {"id": "mine-lora", "root": "/lora", "parent": "mine"},
            ]}))  # fmt: skip
        elif path == "/version":
            await stream.whole('{"version": "0.32.0"}')
        elif path == "/metrics" and self.counted:
            ended = len(self.asked)
            await stream.whole(
                f'vllm:request_success_total{{model_name="mine"}} {ended}.0\n'
                f'vllm:generation_tokens_total{{model_name="mine"}} {TOKENS * ended}.0\n'
                'vllm:request_success_total{model_name="other"} 77.0\n'
                'vllm:generation_tokens_total{model_name="other"} 777.0\n',
                "text/plain",
            )
        else:
            await stream.whole("", status=200 if path == "/health" else 404)

    async def answer(self, stream: Stream, body: dict[str, Any]) -> None:
        path = stream.path.removeprefix(self.prefix)
        if path == "/tokenize":
            found = {"tokens": list(range(TOKENS))} if self.tokenizes else {}
            await stream.whole(json.dumps(found), status=200 if found else 404)
            return
        if self.strict and (odd := sorted(set(body) - KNOWN)):
            error = {"error": {"message": f"unknown fields: {odd}"}}
            await stream.whole(json.dumps(error), status=400)
            return
        if self.refuses > 0:
            self.refuses -= 1
            await stream.whole('{"error": "too much to do"}', status=429)
            return
        self.headers.append(stream.headers)
        chat = "messages" in body
        if chat:
            await self.piece(stream, chat, 0, {"role": "assistant", "content": ""})
        for place, text in enumerate(PIECES):
            await asyncio.sleep(FIRST if place == 0 else NEXT)
            key = "reasoning_content" if self.reasons and place == 0 else self.writes_to
            delta = {key: text} if chat else {"text": text}
            await self.piece(stream, chat, 2 * (place + 1), delta)
        last: dict[str, Any] = {"usage": usage(TOKENS)} if self.usage == "last" else {}
        if self.accepts:
            spent = {"acceptance_histogram": self.accepts, "num_draft_tokens": 9}
            last["metrics"] = {"speculative_decoding": spent}
        await self.piece(stream, chat, TOKENS, {}, "length", **last)
        if self.usage == "own":
            await stream.event(choices=[], usage=usage(TOKENS))
        await stream.send(b"data: [DONE]\n\n")
        self.asked.append(body)

    async def piece(
        self,
        stream: Stream,
        chat: bool,
        tokens: int,
        delta: dict[str, Any],
        finish: str | None = None,
        **more: Any,
    ) -> None:
        if self.usage == "each":
            more["usage"] = usage(tokens)
        choice = {"delta": delta} if chat else {"text": "", **delta}
        await stream.event(choices=[{"index": 0, "finish_reason": finish, **choice}], **more)


def usage(tokens: int) -> dict[str, int]:
    return {"prompt_tokens": 3, "completion_tokens": tokens, "total_tokens": 3 + tokens}
