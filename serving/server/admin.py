"""The address at which the draft of a running server is changed: loopback, and never without a
token."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

from drafts.errors import UserError
from drafts.files import atomic_file, cache_folder, make_folder
from drafts.registry import read_draft
from serving.runtime import is_loopback
from serving.server.process import listening_socket
from serving.server.swappable import How, SwappableServer, Version

TOKEN = "AFASPEC_ADMIN_TOKEN"


@dataclass(frozen=True)
class AdminSettings:
    """Where to listen. Port 0 takes any free one. The token is that of the environment, else one
    that is made and kept in a file that its owner alone can read."""

    host: str = "127.0.0.1"
    port: int = 0


class Admin:
    """Answers in a thread of its own. Use it as a context manager.

    `GET /draft` says what serves and what has served; `POST /draft` with `{"folder": ..., "how":
    ...}`, or `{"back": true}`, changes it and answers a line of JSON for each thing that happens.
    """

    def __init__(self, server: SwappableServer, settings: AdminSettings):
        """Raises `UserError` where it cannot listen, or others could and no token was chosen."""
        chosen = os.environ.get(TOKEN)
        if not chosen and not is_loopback(settings.host):
            raise UserError(
                f"on {settings.host} others can reach the address that changes drafts",
                hint=f"put a token into the environment as {TOKEN}",
            )
        self.server = server
        self.token = chosen or secrets.token_urlsafe(32)
        self._listening = listening_socket(settings.host, settings.port)
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        self.url = f"http://{host}:{self._listening.getsockname()[1]}"

    def __enter__(self) -> Admin:
        import uvicorn

        config = uvicorn.Config(self._app(), lifespan="off", log_level="warning", access_log=False)
        self._uvicorn = uvicorn.Server(config)  # in a thread, where it takes no signals
        self._thread = threading.Thread(
            target=self._uvicorn.run, kwargs={"sockets": [self._listening]}, daemon=True
        )
        self._thread.start()
        self._notes = [note_path(self.url), note_path(self.server.process.url)]
        for path in self._notes:
            write_note(path, self.url, self.token)
        return self

    def __exit__(self, *_: object) -> None:
        for path in self._notes:
            path.unlink(missing_ok=True)
        self._uvicorn.should_exit = True
        self._thread.join(timeout=5)
        self._listening.close()

    def _app(self) -> Any:
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import JSONResponse, Response, StreamingResponse
        from starlette.routing import Route

        def allowed(request: Request) -> bool:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            return secrets.compare_digest(given.encode(), self.token.encode())

        async def draft(request: Request) -> Response:
            if not allowed(request):
                return JSONResponse({"error": "wants the token, as a bearer"}, 401)
            if request.method == "GET":
                return JSONResponse(self._describe())
            try:
                asked = json.loads(await request.body())
            except ValueError:
                asked = None
            if not isinstance(asked, dict) or not (asked.get("folder") or asked.get("back")):
                return JSONResponse({"error": "wants a JSON object with a folder, or back"}, 400)
            if asked.get("how", "auto") not in get_args(How):
                return JSONResponse({"error": f"how is one of {', '.join(get_args(How))}"}, 400)
            return StreamingResponse(self._change(asked), media_type="application/x-ndjson")

        return Starlette(routes=[Route("/draft", draft, methods=["GET", "POST"])])

    def _describe(self) -> dict[str, Any]:
        state = self.server.state()
        return {
            "versions": [describe(version) for version in self.server.versions],
            "in_flight": state.in_flight if state else None,
        }

    def _change(self, asked: dict[str, Any]) -> Iterator[bytes]:
        """A line for each thing that happens, the last one with `version` or `error`.

        The change goes on when its reader leaves.
        """
        lines: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()

        def change() -> None:
            def report(line: str) -> None:
                lines.put({"report": line})

            how = asked.get("how", "auto")
            try:
                if asked.get("back"):
                    done = self.server.back(how, report)
                else:
                    done = self.server.change(read_draft(Path(asked["folder"])), how, report)
                lines.put({"version": describe(done)})
            except UserError as error:
                lines.put({"error": str(error)})
            except Exception as error:  # whoever asked is to hear of it
                lines.put({"error": f"{type(error).__name__}: {error}"})

        threading.Thread(target=change, daemon=True).start()  # it ends with the server
        while True:
            line = lines.get()
            yield json.dumps(line).encode() + b"\n"
            if "report" not in line:
                return


def describe(version: Version) -> dict[str, Any]:
    """A version as JSON."""
    return {
        "number": version.number,
        "folder": str(version.draft.folder),
        "sha256": version.sha256,
        "how": version.how,
        "seconds": round(version.seconds, 3),
        "since": version.since,
    }


def note_path(url: str) -> Path:
    """Where this machine keeps how to reach the admin address of a server at this address."""
    return cache_folder() / "servers" / f"{urlsplit(url).port}.json"


def write_note(path: Path, url: str, token: str) -> None:
    """Keep address and token where their owner alone can read them."""
    make_folder(path.parent)
    path.parent.chmod(0o700)
    with atomic_file(path) as temporary:
        temporary.touch(mode=0o600)
        temporary.write_text(json.dumps({"url": url, "token": token}), encoding="utf-8")


def read_note(url: str) -> dict[str, str] | None:
    """Admin address and token of the server at this address of this machine; None without any, and
    for an address of another machine, whose port may be that of a server here."""
    if not is_loopback(urlsplit(url).hostname or ""):
        return None
    with contextlib.suppress(OSError, ValueError):
        note: dict[str, str] = json.loads(note_path(url).read_text(encoding="utf-8"))
        return note
    return None
