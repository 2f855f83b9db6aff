"""Which of vLLM's flags a user may give beside ours, and who may reach the server."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from drafts.errors import UserError
from serving.runtime import is_loopback, require_vllm, runtime_environment

PARSER = Path(__file__).with_name("vllm_parser.py")
OURS = "afaspec sets it; give it before the `--`"
TARGETS = "afaspec sets it from TARGET"
SECRET = "everyone on this machine can read a command line; put it into the environment as "
TCP = "afaspec serves plain HTTP over TCP; put a proxy that ends TLS in front"
# By vLLM's name of a setting, however it was given.
REFUSED = {
    "host": OURS,
    "port": OURS,
    "speculative_config": OURS,
    "spec_method": OURS,
    "spec_model": OURS,
    "spec_tokens": OURS,
    "model": TARGETS,
    "model_tag": TARGETS,
    "hf_config_path": TARGETS,
    "trust_remote_code": "afaspec runs no code from model folders",
    "api_key": f"{SECRET}VLLM_API_KEY",
    "hf_token": f"{SECRET}HF_TOKEN",
    "uds": TCP,
    "grpc": TCP,
    "grpc_port": TCP,
    "headless": "afaspec waits for the server that it starts",
    "config": "vLLM reads a file of flags only where it is given as --config FILE",
    **dict.fromkeys(
        ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs", "ssl_ciphers"), TCP
    ),
}
API_KEY = "VLLM_API_KEY"


@dataclass(frozen=True)
class VllmFlags:
    """Flags for vLLM that may be passed on: made by `read_flags`, or our own.

    `given` are the settings that they give by vLLM's names; `drain_seconds` is how long vLLM lets
    requests finish when it is ended.
    """

    args: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()
    drain_seconds: float = 0.0


NO_FLAGS = VllmFlags()


def read_flags(args: Sequence[str]) -> VllmFlags:
    """The flags as vLLM's own parser reads them. Takes as long as importing vLLM, unless empty.

    Raises `UserError` for a flag that vLLM does not know, and for one that would undo what afaspec
    promises.
    """
    if not args:
        return NO_FLAGS
    require_vllm()
    found = _parsed(args)
    if "error" in found:
        raise UserError(
            f"vLLM cannot read its flags: {found['error']}",
            where=" ".join(args),
            hint="`vllm serve --help=all` lists them",
        )
    harmless = {"trust_remote_code"} if found.get("trust_remote_code") is False else set()
    for name in found["given"]:
        if name in REFUSED and name not in harmless:
            raise UserError(f"{_flag(name)} cannot be passed through to vLLM", hint=REFUSED[name])
    return VllmFlags(tuple(args), frozenset(found["given"]), found.get("shutdown_timeout") or 0.0)


def _parsed(args: Sequence[str]) -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, "-P", str(PARSER), *args],
        capture_output=True,
        text=True,
        env={**os.environ, **runtime_environment()},
        check=False,
    )
    if child.returncode != 0:
        raise UserError(
            f"vLLM's parser of flags does not run: {child.stderr.strip()[-500:]}",
            hint="`afaspec doctor` checks the installation",
        )
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def _flag(name: str) -> str:
    return "another model" if name == "model_tag" else f"--{name.replace('_', '-')}"


def require_key(host: str, *, allow_no_key: bool = False) -> None:
    """Raise `UserError` for an address that others can reach, where no key keeps them out."""
    if is_loopback(host) or allow_no_key or os.environ.get(API_KEY):
        return
    raise UserError(
        f"on {host or 'every address'} anyone who can reach this machine could use the server",
        hint=f"put a key into the environment as {API_KEY}, or say --allow-no-key",
    )
