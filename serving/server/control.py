"""The parent's end of the Unix socket on which a server with a changeable draft takes orders."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafts.errors import UserError

SWAP_SECONDS = 600.0  # a worker reads the whole draft


@dataclass(frozen=True)
class ServerState:
    """`ready`: it accepts requests. `in_flight` are requests, `connections` those that are open.

    `draft` is a hash of the running draft's files.
    """

    version: int
    draft: str
    in_flight: int
    connections: int
    ready: bool


class Control:
    """Orders to one server."""

    def __init__(self, path: Path):
        self.path = path

    def state(self) -> ServerState | None:
        """None while there is nobody, or nobody any more."""
        try:
            return ServerState(**self._ask("GET", "/state", timeout=5.0))
        except (OSError, http.client.HTTPException, ValueError):
            return None

    def ready(self) -> bool:
        """Does it accept requests?"""
        state = self.state()
        return state is not None and state.ready

    def swap(self, folder: Path, version: int, draft: str) -> dict[str, Any]:
        """Put the draft of `folder` in; how long it took. Raises `UserError` when vLLM refuses."""
        asked = {"folder": str(folder), "version": version, "draft": draft}
        try:
            done = self._ask("POST", "/swap", asked, SWAP_SECONDS)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(
                f"the server does not answer: {error}", hint="read its log; it may have ended"
            ) from None
        if "error" in done:
            raise UserError(
                f"vLLM cannot put it in place: {done['error']}",
                where=folder,
                hint="the running draft goes on; `--how restart` starts another server beside it",
            )
        return done

    def drain(self) -> None:
        """Have it take no further connection."""
        self._ask("POST", "/drain")

    def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, timeout: float = 30.0
    ) -> dict[str, Any]:
        connection = _UnixConnection("localhost", timeout=timeout)
        connection.socket_path = str(self.path)
        try:
            connection.request(method, path, json.dumps(body) if body else None)
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer
        finally:
            connection.close()


class _UnixConnection(http.client.HTTPConnection):
    socket_path = ""

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.socket_path)
