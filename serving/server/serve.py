"""Serve a target with a draft: check that they fit, start vLLM, and look after it until it ends."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import getproxies

from rich.console import Console
from rich.markup import escape

from drafts.checkpoint.info import DraftInfo
from drafts.target.info import TargetInfo
from serving.compatibility import require_compatible, table
from serving.runtime import counts_requests, usable_cores
from serving.sampling import defaults_words
from serving.server.admin import Admin, AdminSettings
from serving.server.flags import API_KEY, read_flags, require_key
from serving.server.process import READY_SECONDS, ServerProcess, ServerSettings
from serving.server.swappable import DRAIN_SECONDS, SwappableServer
from serving.speculation import Drafter, require_drafter
from serving.traffic.acceptance import MIDDLEWARE as BY_TAG
from serving.traffic.middleware import MIDDLEWARE
from serving.traffic.recorder import CollectSettings, check_settings

PLAIN_PROGRESS_SECONDS = 10.0


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled on the same path as Ctrl-C."""


def serve(
    target: TargetInfo,
    draft: Drafter,
    k: int = 3,
    host: str = "127.0.0.1",
    port: int = 8000,
    extra_args: Sequence[str] = (),
    *,
    cache_gib: float = 1.0,
    log: Path | None = None,
    name: str | None = None,
    allow_no_key: bool = False,
    ready_seconds: float = READY_SECONDS,
    prompt: str = "def main():",
    console: Console | None = None,
    admin: AdminSettings | None = None,
    drain_seconds: float = DRAIN_SECONDS,
    collect: CollectSettings | None = None,
) -> int:
    """Serve until Ctrl-C or SIGTERM; the exit status (130 and 143 for these two).

    `extra_args` are a user's flags for vLLM, `name` is what clients call the model (default: as its
    folder). With `admin` the draft can be changed at that address while the server runs; with
    `collect` a share of the traffic is kept. Raises `UserError` when the draft does not fit, a flag
    may not be passed on, others could use the server without a key, the port is taken, or the
    server dies.
    """
    console = console or Console(stderr=True)
    require_key(host, allow_no_key=allow_no_key)
    require_drafter(target, draft)
    if isinstance(draft, DraftInfo):
        console.print(table(require_compatible(target, draft)))
        for warning in draft.warnings:
            console.print(f"Warning: {escape(warning)}.", soft_wrap=True)
    if extra_args:
        console.print("Reading the flags for vLLM with its own parser.")
    settings = ServerSettings(
        target,
        draft,
        k,
        host,
        port,
        flags=read_flags(extra_args),
        cache_gib=cache_gib,
        log=log,
        allow_no_key=allow_no_key,
        ready_seconds=ready_seconds,
        name=name,
        **(collecting(collect) if collect or admin else {}),
    )
    try:
        with _sigterm_as_exception(), _running(settings, admin, drain_seconds) as running:
            server = _process(running)
            _wait_with_progress(server, console)
            _greet(server, prompt, console)
            if collect is not None:
                kept = f"Keeping {collect.rate:.4g} of the requests in {collect.folder}."
                console.print(kept, soft_wrap=True, highlight=False)
            if isinstance(running, SwappableServer):
                console.print(f"Change its draft: afaspec swap {server.url} DRAFT", soft_wrap=True)
            console.print("\nCtrl-C ends the server.")
            try:
                running.wait()
            except KeyboardInterrupt:
                _summary(_process(running), console)
                raise
            raise _process(running).failure("the vLLM server ended by itself")
    except Terminated:
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def collecting(collect: CollectSettings | None) -> dict[str, Any]:
    """What makes a server count by tag and, where it is to, collect, as fields of `ServerSettings`.

    Raises `UserError` for settings that cannot be followed.
    """
    own_args: tuple[str, ...] = ()
    if counts_requests():
        own_args = ("--middleware", BY_TAG, "--per-request-spec-decode-metrics", "summary")
    if collect is None:
        return {"own_args": own_args}
    check_settings(collect)
    own_args += ("--middleware", MIDDLEWARE)
    return {"own_args": own_args, "environment": collect.as_environment()}


@contextmanager
def _running(
    settings: ServerSettings, admin: AdminSettings | None, drain_seconds: float
) -> Iterator[ServerProcess | SwappableServer]:
    if admin is None:
        with ServerProcess(settings) as process:
            yield process
    else:
        with SwappableServer(settings, drain_seconds=drain_seconds) as server, Admin(server, admin):
            yield server


def _process(running: ServerProcess | SwappableServer) -> ServerProcess:
    """The server that serves now."""
    return running.process if isinstance(running, SwappableServer) else running


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    def terminate(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _wait_with_progress(server: ServerProcess, console: Console) -> None:
    """A status line on a terminal; elsewhere a plain line every few seconds."""
    console.print(f"Starting vLLM; its output goes to {server.log}", soft_wrap=True)
    if console.is_terminal:
        with console.status("starting") as status:

            def show(seconds: float, line: str) -> None:
                room = max(20, console.width - 20)
                status.update(escape(f"{seconds:4.0f} s  {line[:room]}"))

            server.wait_ready(on_wait=show)
        return
    shown = time.monotonic()

    def report(seconds: float, line: str) -> None:
        nonlocal shown
        if time.monotonic() - shown >= PLAIN_PROGRESS_SECONDS:
            shown = time.monotonic()
            console.print(escape(f"{seconds:4.0f} s  {line}"), soft_wrap=True, highlight=False)

    server.wait_ready(on_wait=report)


def _greet(server: ServerProcess, prompt: str, console: Console) -> None:
    seconds = time.monotonic() - server.started
    console.print(f"Ready after {seconds:.0f} s at {server.url} (OpenAI API).{_cores(server)}")
    key = f" (in a shell that has {API_KEY})" if os.environ.get(API_KEY) else ""
    console.print(f"Try it{key}:\n")
    print(curl_line(server, prompt), file=sys.stdout, flush=True)
    if defaults := defaults_words(server.settings.target.folder):
        console.print(f"\nRequests that do not say how to sample get the target's own: {defaults}.")


def _cores(server: ServerProcess) -> str:
    """On how many cores vLLM's model runs, where its log says so: on CPUs."""
    threads = server.threads()
    return "" if threads is None else f" The model runs on {threads} of {usable_cores()} cores."


def curl_line(server: ServerProcess, prompt: str) -> str:
    """A command that completes `prompt` through the running server."""
    body = {"model": server.model_name(), "prompt": prompt, "max_tokens": 64, "temperature": 0}
    parts = ["curl", "-s", f"{server.url}/v1/completions", "-H", "Content-Type: application/json"]
    if getproxies():
        parts += ["--noproxy", "*"]  # the server is here, and no proxy need find it
    command = shlex.join([*parts, "-d", json.dumps(body)])
    if os.environ.get(API_KEY):
        command += f' -H "Authorization: Bearer ${API_KEY}"'
    return command


def _summary(server: ServerProcess, console: Console) -> None:
    counters = server.counters()
    if counters and counters.drafts:
        length = 1 + counters.accepted_tokens / counters.drafts
        console.print(
            f"Served {counters.drafts:,} speculative steps, acceptance length {length:.2f}."
        )
    console.print("Stopping vLLM.")
