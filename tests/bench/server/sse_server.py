"""A plain HTTP server of the tests' own that streams as it is told: for the load generator."""

from __future__ import annotations

import asyncio
import json
import ssl
import threading
from collections.abc import Awaitable, Callable
from typing import Any

Answer = Callable[["Stream", dict[str, Any]], Awaitable[None]]
Page = Callable[["Stream"], Awaitable[None]]

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


class Stream:
    """One connection's answer."""

    def __init__(
        self,
        writer: asyncio.StreamWriter,
        server: SseServer,
        path: str = "",
        headers: dict[str, str] | None = None,
    ):
        self.writer, self.server, self.path = writer, server, path
        self.headers = headers or {}
        self.begun = False

    async def raw(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def send(self, data: bytes) -> None:
        """A piece of the body."""
        if not self.begun:
            self.begun = True
            await self.raw(HEAD)
        await self.raw(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    async def event(self, **content: Any) -> None:
        await self.send(b"data: " + json.dumps(content).encode() + b"\n\n")

    async def whole(
        self, body: str | bytes, kind: str = "application/json", status: int = 200
    ) -> None:
        """An answer that is no stream."""
        data = body.encode() if isinstance(body, str) else body
        head = f"HTTP/1.1 {status} Some\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}"
        await self.raw(head.encode() + b"\r\n\r\n" + data)

    async def finish(self, tokens: int) -> None:
        await self.event(choices=[], usage={"completion_tokens": tokens})
        await self.send(b"data: [DONE]\n\n")


class SseServer:
    """Runs in a thread; `answer` writes the events of each request. Use as a context manager.

    `page` answers what is only looked at (GET); without it that is always empty.
    """

    def __init__(
        self,
        answer: Answer,
        page: Page | None = None,
        port: int = 0,
        context: ssl.SSLContext | None = None,
    ):
        self.answer, self.page = answer, page
        self.port, self.context = port, context
        self.running = self.most = 0
        self.release = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> SseServer:
        self._thread.start()
        start = asyncio.start_server(self._connection, "127.0.0.1", self.port, ssl=self.context)
        self._server = asyncio.run_coroutine_threadsafe(start, self._loop).result()
        scheme = "https" if self.context else "http"
        self.url = f"{scheme}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end(self) -> None:
        self._server.close()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                pairs = (line.partition(":") for line in head.decode().split("\r\n")[1:])
                headers = {name.lower(): value.strip() for name, _, value in pairs}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                method, path, _ = head.decode().split(" ", 2)
                stream = Stream(writer, self, path, headers)
                if method == "GET":
                    await (self.page(stream) if self.page else stream.whole(""))
                    continue
                self.running += 1
                self.most = max(self.most, self.running)
                await self.answer(stream, json.loads(body))
                if stream.begun:
                    await stream.raw(b"0\r\n\r\n")
                self.running -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()
