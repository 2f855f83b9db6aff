"""Collecting inside vLLM's own server: `--middleware`, an official place."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from serving.traffic.exchange import Exchange
from serving.traffic.recorder import CollectSettings, Recorder

MIDDLEWARE = "serving.traffic.middleware.Collecting"
VERSION = b"x-draft-version"

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


class Collecting:
    """ASGI middleware that copies what passes, of the requests that are kept."""

    def __init__(self, app: App, recorder: Recorder | None = None):
        """vLLM gives the application alone; the settings stand in the environment then."""
        self.app = app
        self.recorder = recorder or Recorder(CollectSettings.from_environment())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            try:
                await self.app(scope, receive, send)
            finally:
                self.recorder.close()
            return
        exchange = None
        if scope["type"] == "http":
            headers = {k.decode("latin-1"): v.decode("latin-1") for k, v in scope["headers"]}
            exchange = self.recorder.begin(scope["method"], scope["path"], headers)
        if exchange is None:
            await self.app(scope, receive, send)
            return
        if self.recorder.settings.ids_only:
            receive = await with_token_ids(receive)
        try:
            await self.app(scope, received(receive, exchange), sent(send, exchange))
        finally:
            self.recorder.end(exchange)


def received(receive: Receive, exchange: Exchange) -> Receive:
    """`receive`, and what it gives into the exchange."""

    async def copying() -> Message:
        message = await receive()
        if message["type"] == "http.request":
            exchange.request += message.get("body", b"")
        return message

    return copying


def sent(send: Send, exchange: Exchange) -> Send:
    """`send`, and what it gets into the exchange."""

    async def copying(message: Message) -> None:
        if message["type"] == "http.response.start":
            exchange.status = message["status"]
            found = dict(message.get("headers", ())).get(VERSION)
            exchange.draft_version = found.decode() if found else None
        elif message["type"] == "http.response.body":
            exchange.response += message.get("body", b"")
            exchange.complete = not message.get("more_body", False)
        await send(message)

    return copying


async def with_token_ids(receive: Receive) -> Receive:
    """The request, asking vLLM for the token ids too; its answer has them then."""
    body, more = bytearray(), True
    while more:
        message = await receive()
        if message["type"] != "http.request":  # its client has left
            return _once(message, receive)
        body += message.get("body", b"")
        more = message.get("more_body", False)
    try:
        asked = json.loads(body)
        asked["return_token_ids"] = True
        body = bytearray(json.dumps(asked).encode())
    except (ValueError, TypeError):
        pass  # vLLM says what is wrong with it
    return _once({"type": "http.request", "body": bytes(body), "more_body": False}, receive)


def _once(message: Message, receive: Receive) -> Receive:
    first = [message]

    async def next_message() -> Message:
        return first.pop() if first else await receive()

    return next_message
