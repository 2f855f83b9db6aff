"""Collecting in front of a server that is not ours to configure: a small proxy."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp

from drafts.errors import UserError
from serving.runtime import is_loopback
from serving.traffic.middleware import App, Collecting, Message, Receive, Send
from serving.traffic.recorder import CollectSettings, Recorder

# Between two neighbours, by HTTP's own words (RFC 9110, 7.6.1), and what is set anew.
OWN = {
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"te", b"trailer",
    b"transfer-encoding", b"upgrade", b"host", b"content-length",
}  # fmt: skip
PIECE = 1 << 16


class Forward:
    """An ASGI application that asks another server and answers what it answers, piece by piece."""

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif scope["type"] == "http":
            await self._forward(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})

    async def _live(self, receive: Receive, send: Send) -> None:
        while True:
            message = await receive()
            if message["type"] == "lifespan.startup":
                wait = aiohttp.ClientTimeout(total=None, sock_connect=30)
                connector = aiohttp.TCPConnector(limit=0)
                self._session = aiohttp.ClientSession(
                    connector=connector, timeout=wait, auto_decompress=False
                )
                await send({"type": "lifespan.startup.complete"})
            else:
                if self._session is not None:
                    await self._session.close()
                await send({"type": "lifespan.shutdown.complete"})
                return

    async def _forward(self, scope: Message, receive: Receive, send: Send) -> None:
        assert self._session is not None
        path = scope.get("raw_path", scope["path"].encode()).decode("latin-1")
        query = f"?{scope['query_string'].decode('latin-1')}" if scope["query_string"] else ""
        headers = [(k.decode("latin-1"), v.decode("latin-1")) for k, v in passed(scope["headers"])]
        has_body = any(k in (b"content-length", b"transfer-encoding") for k, _ in scope["headers"])
        begun = False
        try:
            async with self._session.request(
                scope["method"],
                self.url + path + query,
                headers=headers,
                data=_body(receive) if has_body else None,
                allow_redirects=False,
            ) as answer:
                begun = True
                await send(start(answer.status, passed(answer.raw_headers)))
                async for piece in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except aiohttp.ClientError as error:
            if begun:  # the client sees an answer that breaks off, as it would have without us
                raise
            said = {"error": {"message": f"the server behind does not answer: {error}"}}
            await send(start(502, [(b"content-type", b"application/json")]))
            await send({"type": "http.response.body", "body": json.dumps(said).encode()})


def start(status: int, headers: list[tuple[bytes, bytes]]) -> Message:
    """The message that begins an answer."""
    return {"type": "http.response.start", "status": status, "headers": headers}


def passed(headers: Any) -> list[tuple[bytes, bytes]]:
    """The headers that go on to the next one."""
    return [(k, v) for k, v in headers if k.lower() not in OWN]


async def _body(receive: Receive) -> AsyncIterator[bytes]:
    more = True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return
        yield message.get("body", b"")
        more = message.get("more_body", False)


def collect_before(
    url: str, settings: CollectSettings, host: str, port: int, *, allow_others: bool = False
) -> None:
    """Serve at `host`:`port` what `url` serves, and keep what passes, until interrupted.

    Raises `UserError` for an address that others can reach, unless that is meant.
    """
    import uvicorn

    if not is_loopback(host) and not allow_others:
        raise UserError(
            f"on {host} others could use the server behind",
            hint="say --allow-others where that server asks for a key of its own",
        )
    app: App = Collecting(Forward(url), Recorder(settings))
    uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False)
