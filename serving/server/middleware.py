"""What runs inside vLLM's server when its draft may be changed: `--middleware`, an official place.

Each answer names the draft that drafted when it began, and /metrics has its version. A second
server on a Unix socket, in a folder that only its owner can enter, takes orders from the process
that started this one (`serving.server.control` is the other end).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import time
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import Counter, Gauge

MIDDLEWARE = "serving.server.middleware.DraftVersions"
SOCKET, VERSION = "AFASPEC_CONTROL_SOCKET", "AFASPEC_DRAFT_VERSION"  # in the environment
HEADER = b"x-draft-version"
CLEAR_SECONDS, CLEAR_EVERY = 60.0, 0.25

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]


@dataclass
class State:
    """What the server is doing. `draft` is a hash of the running draft's files."""

    version: int
    draft: str
    in_flight: int = 0
    draining: bool = False


class DraftVersions:
    """The ASGI middleware."""

    def __init__(self, app: App):
        self.app = app
        version, draft = os.environ[VERSION].split(":")
        self.state = State(int(version), draft)
        self.gauge = Gauge("afaspec:draft_version", "Version of the running draft.", ["draft"])
        self.swaps = Counter("afaspec:draft_swaps", "Drafts put in while the server ran.")
        self._show_version()

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            control = asyncio.create_task(serve_control(scope["app"], self))
            try:
                await self.app(scope, receive, send)
            finally:
                control.cancel()
        elif scope["type"] == "http":
            with self._counted():
                await self.app(scope, receive, self._named(send))
        else:
            await self.app(scope, receive, send)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        self.state.in_flight += 1
        try:
            yield
        finally:
            self.state.in_flight -= 1

    def _named(self, send: Send) -> Send:
        version = str(self.state.version).encode()

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = [*message.get("headers", ()), (HEADER, version)]
                if self.state.draining:  # or its client would ask again where nobody answers
                    headers = [pair for pair in headers if pair[0].lower() != b"connection"]
                    headers.append((b"connection", b"close"))
                message = {**message, "headers": headers}
            await send(message)

        return named

    async def swap(self, app: Any, folder: str, version: int, draft: str) -> dict[str, Any]:
        """Put the draft of `folder` in, between two steps of the engine, on all its workers."""
        engine = app.state.engine_client
        began = time.perf_counter()
        try:
            done = await engine.collective_rpc("replace_draft", args=(folder,))
        except Exception as error:  # what a worker raised comes as the engine's own error
            return {"error": f"{type(error).__name__}: {error}"}
        self.state.version, self.state.draft = version, draft
        self.swaps.inc()
        self._show_version()
        return {
            "seconds": time.perf_counter() - began,
            "loading_seconds": max(one["seconds"] for one in done),
            "prefix_cache_cleared": await self._clear_prefixes(engine),
        }

    async def _clear_prefixes(self, engine: Any) -> bool:
        """Cached prefixes hold what the old draft made of them; while requests run they stay, and
        then they are cleared as soon as none runs."""
        if await engine.reset_prefix_cache():
            return True
        self._clearing = asyncio.create_task(self._clear_later(engine, self.state.version))
        return False

    async def _clear_later(self, engine: Any, version: int) -> None:
        give_up = time.monotonic() + CLEAR_SECONDS
        while self.state.version == version and time.monotonic() < give_up:
            await asyncio.sleep(CLEAR_EVERY)
            if await engine.reset_prefix_cache():
                return

    def drain(self, app: Any) -> None:
        """Take no further connection, and end each one with its next answer."""
        self.state.draining = True
        for listening in app.state.server.servers:
            listening.close()

    def describe(self, app: Any) -> dict[str, Any]:
        """What `serving.server.control.ServerState` reads."""
        server = getattr(app.state, "server", None)
        return {
            "version": self.state.version,
            "draft": self.state.draft,
            "in_flight": self.state.in_flight,
            "connections": len(server.server_state.connections) if server else 0,
            "ready": bool(server and server.started),
        }

    def _show_version(self) -> None:
        self.gauge.clear()
        self.gauge.labels(draft=self.state.draft).set(self.state.version)


async def serve_control(app: Any, middleware: DraftVersions) -> None:
    """Answer on the Unix socket until cancelled."""
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse
    from starlette.routing import Route

    async def state(_: Request) -> JSONResponse:
        return JSONResponse(middleware.describe(app))

    async def swap(request: Request) -> JSONResponse:
        asked = json.loads(await request.body())
        done = await middleware.swap(app, asked["folder"], asked["version"], asked["draft"])
        return JSONResponse(done)

    async def drain(_: Request) -> JSONResponse:
        middleware.drain(app)
        return JSONResponse(middleware.describe(app))

    class Quiet(uvicorn.Server):
        """One that leaves signals to vLLM's own server."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    routes = [
        Route("/state", state),
        Route("/swap", swap, methods=["POST"]),
        Route("/drain", drain, methods=["POST"]),
    ]
    config = uvicorn.Config(
        Starlette(routes=routes), lifespan="off", log_level="warning", access_log=False
    )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(os.environ[SOCKET])
        await Quiet(config).serve(sockets=[listening])
