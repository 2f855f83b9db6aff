"""A server whose draft can be changed while it answers: in place, or by another server that takes
over on the same socket."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from serving.compatibility import require_compatible
from serving.server.control import Control, ServerState
from serving.server.middleware import MIDDLEWARE, SOCKET, VERSION
from serving.server.process import ServerProcess, ServerSettings, listening_socket
from serving.server.room import room_for_two
from serving.swap.fits import differences
from serving.swap.worker import EXTENSION

How = Literal["auto", "in-place", "rolling", "drained"]
Report = Callable[[str], object]
DRAIN_SECONDS = 600.0
LOOK_SECONDS = 0.2  # between looks at a server that drains
TELL_SECONDS = 10.0  # between words about one that starts or drains
HASH_CHARACTERS = 12
IN_SERVER = ("--middleware", MIDDLEWARE, "--worker-extension-cls", EXTENSION)
OURS = {"worker_extension_cls", "api_server_count"}
ONE = ("--api-server-count", "1")  # which takes orders; it has one engine client


@dataclass(frozen=True)
class Version:
    """A draft that served, or serves. `how` it came, how many `seconds` that took, and `since`
    when (ISO 8601)."""

    number: int
    draft: DraftInfo
    sha256: str
    how: str = "start"
    seconds: float = 0.0
    since: str = ""


class SwappableServer:
    """vLLM with a draft that can be changed. Use it as a context manager.

    The socket is held here, so that nobody is refused while servers change. One change at a time.
    """

    def __init__(self, settings: ServerSettings, *, drain_seconds: float = DRAIN_SECONDS):
        """Start the first server and return at once. Raises `UserError` before that."""
        if not isinstance(settings.draft, DraftInfo):
            raise UserError(
                "there is no draft that could be changed", hint="give --draft, or no --swappable"
            )
        if taken := settings.flags.given & OURS:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(taken))
            raise UserError(
                f"{names} cannot be passed through to a server whose draft can be changed",
                hint="leave it out, or --swappable",
            )
        self._settings, self._drain_seconds = settings, drain_seconds
        self._listening = listening_socket(settings.host, settings.port)
        self._folder = Path(tempfile.mkdtemp(prefix="afaspec-control-"))  # only its owner enters
        self._changing = threading.Lock()
        self._ended = threading.Event()
        first = Version(1, settings.draft, settings.draft.sha256, since=_now())
        self.versions = [first]
        try:
            self.process, self._control = self._started(first)
        except BaseException:
            self._tidy()
            raise

    @property
    def current(self) -> Version:
        """What serves now."""
        return self.versions[-1]

    def state(self) -> ServerState | None:
        """What the server says of itself; None where it does not answer."""
        return self._control.state()

    def change(
        self, draft: DraftInfo, how: How = "auto", report: Report = lambda line: None
    ) -> Version:
        """Put another draft in, and return when it serves.

        `auto` is in place where only values differ, else a rolling restart, or a drained one where
        there is no room for two servers. Raises `UserError` when the draft does not fit, or another
        change is under way; the running draft goes on then.
        """
        if not self._changing.acquire(blocking=False):
            raise UserError("another change of the draft is under way", hint="wait until it ends")
        try:
            require_compatible(self._settings.target, draft)
            if self.state() is None:
                raise self.process.failure("the server does not answer, so nothing is changed")
            new = Version(self.current.number + 1, draft, draft.sha256)
            began = time.monotonic()
            done = (how in ("auto", "in-place") and self._put_in_place(new, how, report)) or (
                self._restarted(new, how, report)
            )
            seconds = time.monotonic() - began
            self.versions.append(replace(new, how=done, seconds=seconds, since=_now()))
            return self.current
        finally:
            self._changing.release()

    def back(self, how: How = "auto", report: Report = lambda line: None) -> Version:
        """Put the draft in again that served before this one.

        Raises `UserError` where there is none, or where its files are not what they were.
        """
        earlier = [v for v in self.versions if v.sha256 != self.current.sha256]
        if not earlier:
            raise UserError("no other draft served before this one", hint="name one to put in")
        draft = replace(earlier[-1].draft)  # whose hash is of its files as they are now
        if draft.sha256 != earlier[-1].sha256:
            raise UserError(
                "is not the draft that served: its files have changed",
                where=draft.folder,
                hint="name a folder that holds it",
            )
        return self.change(draft, how, report)

    def wait(self) -> None:
        """Wait until the server ends by itself."""
        while not self._ended.wait(LOOK_SECONDS):
            if self.process.ended and not self._changing.locked():
                return

    def __enter__(self) -> SwappableServer:
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        try:
            self.process.stop()
        finally:
            self._tidy()

    def _tidy(self) -> None:
        self._listening.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _started(self, version: Version) -> tuple[ServerProcess, Control]:
        """Another server with this draft, on the same socket. Its log has the version's number."""
        control = Control(self._folder / f"{version.number}-{time.monotonic_ns()}")
        identity = f"{version.number}:{version.sha256[:HASH_CHARACTERS]}"
        log = self._settings.log
        settings = replace(
            self._settings,
            draft=version.draft,
            own_args=(*IN_SERVER, *ONE, *self._settings.own_args),
            environment={
                **self._settings.environment,
                SOCKET: str(control.path),
                VERSION: identity,
            },
            log=log.with_name(f"{log.stem}-{version.number}{log.suffix}")
            if log and version.number > 1
            else log,
        )
        return ServerProcess(settings, self._listening, control.ready), control

    def _put_in_place(self, new: Version, how: How, report: Report) -> str | None:
        """`in place`; None where that cannot be and another way may be taken."""
        found = differences(self.current.draft, new.draft)
        if found and how == "in-place":
            raise UserError(
                "\n".join(["cannot take the running draft's place:", *found[:10]]),
                where=new.draft.folder,
                hint="`--how auto` starts another server that takes over",
            )
        for line in found[:5]:
            report(f"not in place: {line}")
        if found:
            return None
        report("putting it in place")
        try:
            done = self._control.swap(new.draft.folder, new.number, new.sha256[:HASH_CHARACTERS])
        except UserError as error:
            if how == "in-place":
                raise
            report(f"not in place: {error}")
            return None
        report(f"vLLM stood still for {1e3 * done['loading_seconds']:.0f} ms")
        if not done["prefix_cache_cleared"]:
            report("cached prefixes are cleared when no request runs")
        return "in place"

    def _restarted(self, new: Version, how: How, report: Report) -> str:
        """Another server takes over; which way it was done."""
        old, old_control = self.process, self._control
        if how == "rolling" or (how != "drained" and room_for_two(old.pid)):
            report("starting another server beside this one")
            server, control = self._ready(new, report)
            self.process, self._control = server, control
            self._drain(old_control, report)
            old.stop()
            return "rolling restart"
        report("this server ends first, and requests wait for the next one")
        self._drain(old_control, report)
        old.stop()
        try:
            self.process, self._control = self._ready(new, report)
        except UserError:
            report("it does not start; the old draft comes back")
            self.process, self._control = self._ready(self.current, report)
            raise
        return "drained restart"

    def _ready(self, version: Version, report: Report) -> tuple[ServerProcess, Control]:
        server, control = self._started(version)
        shown = time.monotonic()

        def waiting(seconds: float, _: str) -> None:
            nonlocal shown
            if time.monotonic() - shown >= TELL_SECONDS:
                shown = time.monotonic()
                report(f"starting, {seconds:.0f} s")

        try:
            server.wait_ready(on_wait=waiting)
        except BaseException:
            server.stop()
            raise
        return server, control

    def _drain(self, control: Control, report: Report) -> None:
        """Wait until nothing of a server's is under way, and no connection is open."""
        control.drain()
        give_up = time.monotonic() + self._drain_seconds
        shown = time.monotonic()
        while (state := control.state()) is not None and state.in_flight + state.connections:
            if time.monotonic() > give_up:
                report(f"{state.in_flight} requests took longer than --drain-seconds and are cut")
                return
            if time.monotonic() - shown >= TELL_SECONDS:
                shown = time.monotonic()
                report(f"draining, {state.in_flight} requests under way")
            time.sleep(LOOK_SECONDS)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
