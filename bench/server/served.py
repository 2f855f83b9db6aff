"""Start a server for each arm and measure them: side by side, or one after another."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from bench.records.arms import Arm
from bench.records.progress import Note, Progress
from bench.report.schema import Report
from bench.server.config import ServerConfig
from bench.server.measure import LoadRun, measure_servers
from bench.server.requests import load_requests
from bench.server.run import Explained, connect_all, explain_differences, finish, run_server_bench
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from serving.compatibility import require_compatible
from serving.remote import RemoteServer
from serving.runtime import has_gpu
from serving.server.flags import refuse_flags
from serving.server.process import ServerProcess, ServerSettings

How = Literal["together", "in-turn"]
PER_REQUEST = "per_request_spec_decode_metrics"
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
    extra_args: Sequence[str] = (),
    log_folder: Path | None = None,
    note: Note | None = None,
) -> Report:
    """Serve the target with each arm's draft and measure the servers.

    `together` starts all at once, so that they take turns round by round; `in-turn` has only one
    run at a time, for machines that hold no more, and meets the machine as it is at that time.
    `extra_args` go to every vLLM. Raises `UserError` before anything starts if drafts, prompts or
    flags do not fit.
    """
    if config.target is None:
        raise UserError("--serve needs TARGET", hint="give the folder of the model to serve")
    refuse_flags(tuple(extra_args))
    for arm in arms:
        if isinstance(arm.draft, DraftInfo):
            require_compatible(config.target, arm.draft)
    requests = load_requests(config, None, k, note)
    logs = log_folder or Path(tempfile.mkdtemp(prefix="afaspec-bench-"))
    share = len(arms) if how == "together" else 1
    longest = max(len(request.prompt or []) for request in requests)
    positions = longest + config.max_tokens + k + 1
    settings = {
        arm.name: ServerSettings(
            config.target,
            arm.drafter,
            k,
            port=0,
            extra_args=_flags(arm, positions, extra_args, share),
            cache_gib=cache_gib,
            log=logs / f"server-{arm.name}.log",
            draft_sample_method=draft_sample_method,
        )
        for arm in arms
    }
    drafts = {arm.name: arm for arm in arms}
    if how == "together":
        with _started(settings, progress) as urls:
            return run_server_bench(config, urls, progress, drafts=drafts)
    results: list[list[LoadRun]] = [[] for _ in config.loads]
    servers: dict[str, RemoteServer] = {}
    explained: Explained = (None, None)
    plain_last = sorted(arms, key=lambda arm: arm.draft is None)  # it explains the differences
    for arm in plain_last:
        with _started({arm.name: settings[arm.name]}, progress) as urls:
            found = connect_all(config, urls)
            servers |= found
            for runs, more in zip(
                results, measure_servers(config, found, requests, progress), strict=True
            ):
                runs += more
            if arm.draft is None:
                explained = explain_differences(
                    config, results, requests, found[arm.name], progress
                )
    order = {arm.name: position for position, arm in enumerate(arms)}
    for runs in results:
        runs.sort(key=lambda run: order[run.name])
    return finish(config, results, servers, requests, drafts, explained)


@contextmanager
def _started(settings: dict[str, ServerSettings], progress: Progress) -> Iterator[dict[str, str]]:
    """The servers' addresses while they run. They load side by side, each mostly on one core."""
    with ExitStack() as stack:
        servers = {name: stack.enter_context(ServerProcess(one)) for name, one in settings.items()}
        for done, server in enumerate(servers.values()):
            progress("starting servers", done, len(servers))
            server.wait_ready()
        progress("starting servers", len(servers), len(servers))
        yield {name: server.url for name, server in servers.items()}


def _flags(arm: Arm, positions: int, given: Sequence[str], servers: int) -> tuple[str, ...]:
    """`given` and, where it leaves them open, the flags that this measurement wants."""
    wanted = {"--max-model-len": str(positions)}
    if arm.draft is not None and counts_requests():
        wanted[f"--{PER_REQUEST.replace('_', '-')}"] = "summary"
    if has_gpu() and servers > 1:
        wanted["--gpu-memory-utilization"] = f"{GPU_SHARE / servers:.3f}"
    named = {argument.partition("=")[0].replace("_", "-") for argument in given}
    flags = [part for flag, value in wanted.items() if flag not in named for part in (flag, value)]
    return (*flags, *given)


def counts_requests() -> bool:
    """Whether the installed vLLM can report acceptance by request, without importing it."""
    package = find_spec("vllm")
    folders = package.submodule_search_locations if package else None
    return any(
        PER_REQUEST in path.read_text(encoding="utf-8")
        for folder in folders or []
        if (path := Path(folder) / "config" / "observability.py").is_file()
    )
