"""Start a server for each arm and measure them: side by side, or one after another."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Literal

from bench.records.arms import Arm
from bench.records.progress import Note, Progress
from bench.report.cautions import IN_TURN, tell
from bench.report.schema import Report, warn
from bench.server.config import ServerConfig
from bench.server.measure import LoadRun, measure_servers
from bench.server.requests import load_requests
from bench.server.run import (
    Explained,
    connect_all,
    explain_differences,
    finish,
    kept_turns,
    known_before,
    run_server_bench,
)
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from serving.compatibility import require_compatible
from serving.remote import RemoteServer
from serving.runtime import PER_REQUEST, counts_requests, has_gpu
from serving.server.flags import VllmFlags, read_flags
from serving.server.process import READY_SECONDS, ServerProcess, ServerSettings
from serving.speculation import require_drafter

How = Literal["together", "in-turn"]
GPU_SHARE = 0.9  # of a GPU's memory, for all servers together; vLLM's own default for one


def run_served_bench(
    config: ServerConfig,
    arms: Sequence[Arm],
    k: int,
    how: How,
    progress: Progress = lambda stage, done, total: None,
    *,
    cache_gib: float = 1.0,
    draft_sample_method: str | None = None,
    own_args: Sequence[str] = (),
    extra_args: Sequence[str] = (),
    ready_seconds: float = READY_SECONDS,
    log_folder: Path | None = None,
    name: str | None = None,
    note: Note = lambda text: None,
    keep: Path | None = None,
) -> Report:
    """Serve the target with each arm's draft and measure the servers.

    `together` starts all at once, so that they take turns round by round; `in-turn` has only one
    run at a time, for machines that hold no more, and meets the machine as it is at that time.
    `own_args` and a user's `extra_args` go to every vLLM, which has `ready_seconds` to start in and
    calls the target by `name` (default: as its folder).
    `note` is told what is known before the run and should be; turns are written into `keep` (see
    `run_server_bench`). Raises `UserError` before anything
    starts if drafts, prompts or flags do not fit.
    """
    if config.target is None:
        raise UserError("--serve needs TARGET", hint="give the folder of the model to serve")
    flags = read_flags(extra_args)
    for arm in arms:
        require_drafter(config.target, arm.drafter, arm.fields)
        if isinstance(arm.draft, DraftInfo):
            require_compatible(config.target, arm.draft)
    most = max(arm.k(k) for arm in arms)
    requests = load_requests(config, None, most, note)
    logs = log_folder or Path(tempfile.mkdtemp(prefix="afaspec-bench-"))
    share = len(arms) if how == "together" else 1
    longest = max(len(request.prompt or []) for request in requests)
    positions = longest + config.max_tokens + most + 1
    settings = {
        arm.name: ServerSettings(
            config.target,
            arm.drafter,
            k,
            port=0,
            own_args=(*own_args, *_own_flags(arm, positions, flags, share)),
            flags=flags,
            cache_gib=cache_gib,
            log=logs / f"server-{arm.name}.log",
            draft_sample_method=draft_sample_method,
            speculation=arm.fields,
            ready_seconds=ready_seconds,
            name=name,
        )
        for arm in arms
    }
    drafts = {arm.name: arm for arm in arms}
    if how == "together":
        with _started(settings, progress) as started:
            return run_server_bench(
                config,
                _urls(started),
                progress,
                drafts=drafts,
                note=note,
                threads=_threads(started),
                keep=keep,
            )
    results: list[list[LoadRun]] = [[] for _ in config.loads]
    servers: dict[str, RemoteServer] = {}
    explained: Explained = (None, None)
    threads: dict[str, int] = {}
    plain_last = sorted(arms, key=lambda arm: arm.draft is None)  # it explains the differences
    for arm in plain_last:
        with _started({arm.name: settings[arm.name]}, progress) as started:
            found = connect_all(config, _urls(started))
            threads |= _threads(started)
            servers |= found
            tell(note, known_before(config, found, requests, drafts))
            turns = kept_turns(keep, config, found, requests, drafts, note)
            measured = measure_servers(config, found, requests, progress, turns=turns, note=note)
            for runs, more in zip(results, measured, strict=True):
                runs += more
            if arm.draft is None:
                explained = explain_differences(
                    config, results, requests, found[arm.name], progress
                )
    order = {arm.name: position for position, arm in enumerate(arms)}
    for runs in results:
        runs.sort(key=lambda run: order[run.name])
    report = finish(config, results, servers, requests, drafts, explained, threads)
    if len(arms) > 1:
        warn(report, {arm.name: IN_TURN for arm in arms})
    return report


def _urls(servers: Mapping[str, ServerProcess]) -> dict[str, str]:
    return {name: server.url for name, server in servers.items()}


def _threads(servers: Mapping[str, ServerProcess]) -> dict[str, int]:
    """How many threads run each model, of those whose logs say so."""
    return {name: found for name, server in servers.items() if (found := server.threads())}


@contextmanager
def _started(
    settings: dict[str, ServerSettings], progress: Progress
) -> Iterator[dict[str, ServerProcess]]:
    """The servers while they run. They load side by side, each mostly on one core."""
    with ExitStack() as stack:
        servers = {name: stack.enter_context(ServerProcess(one)) for name, one in settings.items()}
        for done, server in enumerate(servers.values()):
            progress("starting servers", done, len(servers))
            server.wait_ready()
        progress("starting servers", len(servers), len(servers))
        yield servers


def _own_flags(arm: Arm, positions: int, given: VllmFlags, servers: int) -> list[str]:
    """The flags that this measurement wants, where a user's leave them open."""
    wanted = {"max_model_len": str(positions)}
    if arm.draft is not None and counts_requests():
        wanted[PER_REQUEST] = "summary"
    if has_gpu() and servers > 1:
        wanted["gpu_memory_utilization"] = f"{GPU_SHARE / servers:.3f}"
    return [
        part
        for name, value in wanted.items()
        if name not in given.given
        for part in (f"--{name.replace('_', '-')}", value)
    ]
