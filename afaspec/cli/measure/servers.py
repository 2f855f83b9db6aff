"""The server half of `afaspec bench`: --url and --serve."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.errors import UserError

if TYPE_CHECKING:
    from bench.records.arms import Arm
    from bench.records.progress import Progress
    from bench.report.schema import Report
    from bench.server.config import ServerConfig


HOWS = ("together", "in-turn")


def require_one_way(url: list[str], serve: str | None, only_servers: Mapping[str, Any]) -> bool:
    """Whether servers are to be measured. Raises `UserError` for flags that do not go together.

    `only_servers` has, by flag, what was given of that which only servers can do.
    """
    if url and serve is not None:
        raise UserError("--url and --serve exclude each other", hint="give one of the two")
    if serve is not None and serve not in HOWS:
        raise UserError(
            f"--serve is {serve!r}",
            hint="give together (side by side) or in-turn (one after another)",
        )
    if url or serve is not None:
        return True
    given = [flag for flag, value in only_servers.items() if value]
    if given:
        raise UserError(
            f"{given[0]} is for servers only", hint="give --url NAME=URL or --serve together"
        )
    return False


def measure(
    config: ServerConfig,
    urls: list[str],
    serve: str | None,
    arms: tuple[Arm, ...],
    progress: Progress,
    *,
    k: int,
    cache_gib: float,
    draft_sample_method: str | None,
    server_args: list[str],
    log_folder: Path,
) -> Report:
    """The report of the servers at `urls`, or of those that `serve` starts."""
    from bench.server.config import served_arms
    from bench.server.run import run_server_bench
    from bench.server.served import run_served_bench

    if serve is None:
        addresses, drafts = served_arms(urls, arms)
        return run_server_bench(config, addresses, progress, drafts=drafts)
    return run_served_bench(
        config,
        arms,
        k,
        "together" if serve == "together" else "in-turn",
        progress,
        cache_gib=cache_gib,
        draft_sample_method=draft_sample_method,
        extra_args=server_args,
        log_folder=log_folder,
    )


def flags_of(server_args: str, dtype: str, enforce_eager: bool) -> list[str]:
    """vLLM's flags from one string as a shell reads it, and from afaspec's own."""
    try:
        given = shlex.split(server_args)
    except ValueError as error:
        raise UserError(f"cannot read --server-args ({error})", hint="close its quotes") from None
    eager = ["--enforce-eager"] if enforce_eager else []
    return ["--dtype", dtype, *eager, *given]
