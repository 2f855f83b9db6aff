"""`vllm serve` as a child that cannot outlive its parent."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any

from drafts.errors import UserError
from drafts.files import disk_errors
from drafts.hub import folder_name
from drafts.target.info import TargetInfo
from serving.metrics import SpecCounters, counters_from_prometheus
from serving.runtime import compute_dtype, require_vllm, runtime_environment
from serving.server.flags import API_KEY, NO_FLAGS, VllmFlags, require_key
from serving.speculation import Drafter, engine_options, speculative_config

GRACE_SECONDS = 10.0  # to end in, beyond what vLLM was told to let requests finish in
READY_SECONDS = 1800.0
TAIL_LINES = 15
GUARDIAN, LAUNCH = (Path(__file__).with_name(name) for name in ("guardian.py", "launch.py"))
ROOT = Path(__file__).resolve().parents[2]  # vLLM imports parts of us by name
# What vLLM's log says of each worker: the cores that the threads of its model are bound to.
BOUND = re.compile(r"\blocal_rank=\d+, core ids=\[([\d, ]+)\]")


@dataclass(frozen=True)
class ServerSettings:
    """What to serve and where. Port 0 takes any free port.

    `own_args` go to vLLM as they are, and `flags`, which a user gave, behind them: the last counts.
    Beyond this machine it listens with a key in the environment, or where `allow_no_key` says so.
    The server has `ready_seconds` to start in. It answers for the model by `name`, unless the
    flags give another; None means the folder's own. `environment` is added to its processes'.
    """

    target: TargetInfo
    draft: Drafter
    k: int = 3
    host: str = "127.0.0.1"
    port: int = 8000
    own_args: tuple[str, ...] = ()
    flags: VllmFlags = NO_FLAGS
    cache_gib: float = 1.0
    log: Path | None = None
    draft_sample_method: str | None = None
    speculation: Mapping[str, Any] = field(default_factory=dict, hash=False)
    allow_no_key: bool = False
    ready_seconds: float = READY_SECONDS
    name: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict, hash=False)


class ServerProcess:
    """A vLLM server and the guardian that ends it. Use it as a context manager, or call `stop`."""

    def __init__(
        self,
        settings: ServerSettings,
        listening: socket.socket | None = None,
        ready: Callable[[], bool] | None = None,
    ):
        """Start it and return at once. Raises `UserError` before anything is started.

        `listening` is a bound socket for it to serve on, which others may serve on too; `ready`
        tells then when this one does.
        """
        require_vllm()
        require_key(settings.host, allow_no_key=settings.allow_no_key)
        self.settings = settings
        own = None if listening else listening_socket(settings.host, settings.port)
        bound = listening or own
        assert bound is not None
        self.port = int(bound.getsockname()[1])
        self._is_ready = ready or (lambda: self._get("/health", timeout=2.0) is not None)
        self.started = time.monotonic()
        self.log = settings.log or Path(tempfile.mkdtemp(prefix="afaspec-serve-")) / "server.log"
        grace = str(GRACE_SECONDS + settings.flags.drain_seconds)
        number = bound.fileno()
        command = [sys.executable, "-P", str(GUARDIAN), grace, *self._vllm_command(number)]
        paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        with disk_errors(self.log), own or contextlib.nullcontext():
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("wb") as log:
                self._guardian = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={
                        **os.environ,
                        **runtime_environment(settings.cache_gib),
                        "PYTHONPATH": os.pathsep.join(paths),
                        **settings.environment,
                    },
                    pass_fds=[number],
                    start_new_session=True,  # Ctrl-C in the terminal reaches only the parent
                )

    def _vllm_command(self, socket_number: int) -> list[str]:
        s = self.settings
        command = [sys.executable, "-P", str(LAUNCH), str(socket_number), "serve"]
        command += [str(s.target.folder)]
        command += ["--host", s.host, "--port", str(self.port)]
        if "served_model_name" not in s.flags.given:
            command.append(f"--served-model-name={s.name or folder_name(s.target.folder)}")
        if "dtype" not in s.flags.given and (dtype := compute_dtype("auto")) == "float32":
            command += ["--dtype", dtype]
        speculative = speculative_config(
            s.draft, s.k, draft_sample_method=s.draft_sample_method, fields=s.speculation
        )
        if speculative is not None:
            command += ["--speculative-config", json.dumps(speculative)]
            command += [f"--{name.replace('_', '-')}" for name in engine_options(s.target, s.draft)]
        return [*command, *s.own_args, *s.flags.args]

    @property
    def pid(self) -> int:
        """Process id of the guardian, which is also the session of all server processes."""
        return self._guardian.pid

    @property
    def url(self) -> str:
        """Where a client on this machine reaches the server."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.settings.host, self.settings.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    def wait_ready(
        self,
        on_wait: Callable[[float, str], None] = lambda seconds, line: None,
    ) -> None:
        """Wait until it serves. `on_wait` gets the seconds so far and the log's last line.

        Raises `UserError` with the log's end when the server dies or its time to start is over.
        """
        timeout = self.settings.ready_seconds
        while not self._is_ready():
            seconds = time.monotonic() - self.started
            if self._guardian.poll() is not None:
                raise self.failure("vLLM ended before it was ready")
            if seconds > timeout:
                raise self.failure(
                    f"vLLM was not ready after {timeout:.0f} seconds (--ready-seconds gives more)"
                )
            on_wait(seconds, (self.tail(1) or [""])[0])
            time.sleep(0.25)

    @property
    def ended(self) -> bool:
        """Has it ended, by itself or because it was stopped?"""
        return self._guardian.poll() is not None

    def wait(self) -> int:
        """Wait until the server ends by itself; its exit status."""
        return self._guardian.wait()

    def stop(self) -> int:
        """End the server and all its children; its exit status. Interrupted, it kills them."""
        if self._guardian.stdin:
            self._guardian.stdin.close()
        try:
            return self._guardian.wait()
        except BaseException:
            self._guardian.terminate()
            self._guardian.wait()
            raise

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def model_name(self) -> str:
        """The name under which the server answers for the model."""
        names = self._get("/v1/models")
        return str(json.loads(names)["data"][0]["id"] if names else self.settings.target.folder)

    def threads(self) -> int | None:
        """How many threads run the model on CPUs, by vLLM's log; None where it does not say."""
        bound = BOUND.findall(self.log.read_text(encoding="utf-8", errors="replace"))
        return sum(len(cores.split(",")) for cores in bound) or None

    def counters(self) -> SpecCounters | None:
        """Speculation so far; None when the server does not say."""
        text = self._get("/metrics")
        return counters_from_prometheus(text) if text else None

    def tail(self, lines: int = TAIL_LINES) -> list[str]:
        """The last non-empty lines of the server's log."""
        with self.log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 400 * (lines + 1)))
            text = file.read().decode(errors="replace").replace("\r", "\n")
        return [line for line in text.splitlines() if line.strip()][-lines:]

    def failure(self, problem: str) -> UserError:
        """The error to raise when the server went wrong, with the end of its log."""
        tail = "\n".join(f"  {line}" for line in self.tail())
        return UserError(
            f"{problem}; the end of its log:\n{tail}",
            where=self.log,
            hint="read the log; `afaspec doctor` checks the installation",
        )

    def _get(self, path: str, timeout: float = 5.0) -> str | None:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        request = urllib.request.Request(self.url + path)
        if key := os.environ.get(API_KEY):
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with direct.open(request, timeout=timeout) as answer:
                text: str = answer.read().decode()
        except (OSError, HTTPException, ValueError):  # not up yet, or not any more
            return None
        return text


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket bound to `port` (any free one for 0), to listen on. Raises `UserError` where that
    cannot be."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise UserError(
            f"cannot listen on {host} port {port}: {error}",
            hint="end what listens there, or choose another with --port (0 takes a free one)",
        ) from None
    return bound
