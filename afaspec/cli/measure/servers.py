"""The server half of `afaspec bench`: --url and --serve."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from afaspec.cli.console import note
from bench.records.settings import BenchSettings, ClientSettings, Listed
from drafts.errors import UserError

if TYPE_CHECKING:
    from bench.records.arms import Arm
    from bench.records.progress import Progress
    from bench.report.schema import Report
    from bench.server.config import ServerConfig

OF_SERVERS = (
    "request_rate", "requests", "model", "reuse_prefixes", "omit_fields", "server_args",
    "metrics_url", "key", "header", "request_body", "request_seeds", "retries", "ramp_up", "slo",
)  # fmt: skip
OF_URLS = ("metrics_url", "key")


class ServerFlags(ClientSettings, BenchSettings):
    """Which servers are measured, if any, and the load on them."""

    GROUP: ClassVar[str] = ClientSettings.GROUP

    url: list[str] = Field(
        [], description="NAME=URL of a running server of the OpenAI API, an arm each; repeatable"
    )
    serve: Literal["together", "in-turn"] | None = Field(
        None, description="start a server for each arm and measure those"
    )
    server_args: str = Field("", description="with --serve: flags for vLLM, in one string")
    ready_seconds: float = Field(
        1800.0, gt=0, description="with --serve: how long vLLM may take to start"
    )
    request_rate: Listed | None = Field(
        None, description="requests per second, at random times: 0.5,1,2 or inf"
    )

    @property
    def of_servers(self) -> bool:
        """Whether servers are to be measured."""
        return bool(self.url) or self.serve is not None


def require_one_way(flags: ServerFlags) -> None:
    """Raise `UserError` for flags that do not go together."""
    if flags.url and flags.serve is not None:
        raise UserError("--url and --serve exclude each other", hint="give one of the two")
    given = [name for name in OF_SERVERS if getattr(flags, name)]
    if given and not flags.of_servers:
        raise UserError(
            f"--{given[0].replace('_', '-')} is for servers only",
            hint="give --url NAME=URL or --serve together",
        )
    if flags.of_servers and flags.engines != "together":
        raise UserError(
            "--engines is for engines in this command's care",
            hint="give --serve in-turn" if flags.serve else "leave it out",
        )
    if flags.url and flags.tensor_parallel > 1:
        raise UserError(
            "--tensor-parallel is for engines and servers that are started here",
            hint="start the servers so",
        )
    if flags.serve and (given := [name for name in OF_URLS if getattr(flags, name)]):
        raise UserError(
            f"--{given[0].replace('_', '-')} is for servers that run already",
            hint="leave it out: a server that --serve starts shows its own counters",
        )


def measure(
    flags: ServerFlags,
    config: ServerConfig,
    arms: tuple[Arm, ...],
    progress: Progress,
    out: Path,
    name: str | None,
) -> Report:
    """The report of the servers at --url, or of those that --serve starts and that call the target
    `name`."""
    from bench.server.config import served_arms
    from bench.server.run import run_server_bench
    from bench.server.served import run_served_bench

    if flags.serve is None:
        addresses, drafts = served_arms(flags.url, arms)
        return run_server_bench(config, addresses, progress, drafts=drafts, note=note, keep=out)
    return run_served_bench(
        config,
        arms,
        flags.k,
        flags.serve,
        progress,
        cache_gib=flags.cache_gib,
        draft_sample_method=flags.draft_sample_method,
        own_args=own_flags(flags),
        extra_args=vllm_flags(flags),
        ready_seconds=flags.ready_seconds,
        log_folder=out / "logs",
        name=name,
        note=note,
        keep=out,
    )


def own_flags(flags: ServerFlags) -> list[str]:
    """What our settings are called by vLLM's server."""
    parallel = ["--tensor-parallel-size", str(flags.tensor_parallel)]
    return [
        "--dtype",
        flags.dtype,
        *(["--enforce-eager"] if flags.enforce_eager else []),
        *(parallel if flags.tensor_parallel > 1 else []),
    ]


def vllm_flags(flags: ServerFlags) -> list[str]:
    """A user's flags for vLLM from one string, as a shell reads it."""
    try:
        return shlex.split(flags.server_args)
    except ValueError as error:
        raise UserError(f"cannot read --server-args ({error})", hint="close its quotes") from None
