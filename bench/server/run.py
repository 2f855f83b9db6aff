"""Measure running servers side by side: `run_server_bench`, from settings to report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.lossless.greedy import Difference, Noise, explain, with_texts
from bench.prompts.load import template_record
from bench.prompts.trained_on import trained_on_warnings
from bench.records.arms import Arm
from bench.records.progress import Note, Progress
from bench.records.turns import Turns, file_name, open_turns
from bench.report.cautions import foreseen, tell
from bench.report.example import example
from bench.report.provenance import (
    arm_provenance,
    circumstances,
    common_provenance,
    suite_record,
)
from bench.report.schema import Report, warn
from bench.server.config import ServerConfig
from bench.server.engine import ServerEngine
from bench.server.measure import LoadRun, Turn, decodes_plainly, measure_servers, round_size
from bench.server.options import read_keys
from bench.server.report import build_server_report, first_differences
from bench.server.requests import Request, content_hash, load_requests, require_same_model
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from serving.remote import RemoteServer, connect
from serving.sampling import NEUTRAL

Explained = tuple[dict[str, list[Difference]] | None, Noise | None]


def run_server_bench(
    config: ServerConfig,
    urls: Mapping[str, str],
    progress: Progress = lambda stage, done, total: None,
    *,
    drafts: Mapping[str, Arm] | None = None,
    note: Note = lambda text: None,
    threads: Mapping[str, int] | None = None,
    keep: Path | None = None,
) -> Report:
    """Measure the servers at `urls` (by arm name) and return the report.

    With `keep` every turn is written into that folder as it ends, and those that it has are not
    measured again; `bench.records.turns.forget_turns` removes them when the report is written.

    `drafts` says, for those arms where the user told us, what their servers draft with. `note` is
    told what is known before the run and should be, which the report has as warnings. `threads` is
    how many run each model, of the servers that we started on CPUs.
    Raises `UserError` before any load if a server, the target or the prompts do not fit.
    """
    servers = connect_all(config, urls)
    requests = prepare(config, list(servers.values()), note)
    tell(note, known_before(config, servers, requests, drafts or {}))
    turns = kept_turns(keep, config, servers, requests, drafts or {}, note)
    before = len(turns.ended)
    results = measure_servers(config, servers, requests, progress, turns=turns, note=note)
    plain = next((s for name, s in servers.items() if decodes_plainly(name, s)), None)
    explained = explain_differences(config, results, requests, plain, progress)
    report = finish(config, results, servers, requests, drafts or {}, explained, threads or {})
    if before:
        report.provenance["turns_of_an_interrupted_run"] = before
    return report


def kept_turns(
    folder: Path | None,
    config: ServerConfig,
    servers: Mapping[str, RemoteServer],
    requests: Sequence[Request],
    drafts: Mapping[str, Arm],
    note: Note = lambda text: None,
) -> Turns[Turn]:
    """The turns that a run of the same settings, prompts and servers has ended before."""
    if folder is None:
        return Turns[Turn]()
    arms = {
        name: {
            "model": server.root,
            "vllm": server.version,
            "k": server.k,
            "draft": arm.draft.sha256 if isinstance(arm.draft, DraftInfo) else None,
        }
        for (name, server), arm in zip(
            servers.items(), arms_of(servers, drafts).values(), strict=True
        )
    }
    settings = {**config.settings(), "prompts_sha256": content_hash(requests), "arms": arms}
    turns = open_turns(folder / file_name(list(servers)), settings, Turn)
    if turns.ended:
        note(f"{len(turns.ended)} turns were measured before, by {turns.path}")
    return turns


def connect_all(config: ServerConfig, urls: Mapping[str, str]) -> dict[str, RemoteServer]:
    """The servers by arm name, all of the same model as far as that shows."""
    pages = config.pages
    for name in (*pages, *read_keys(config.key)):
        if name not in urls:
            raise UserError(
                f"there is no server {name!r}: they are {', '.join(urls)}",
                hint="name it as in --url NAME=URL",
            )
    servers = {
        name: connect(
            url,
            config.model,
            counted=False if pages.get(name) == () else None,
            pages=pages.get(name, ()),
            headers=config.headers_of(name),
        )
        for name, url in urls.items()
    }
    require_same_model(servers, config.target)
    return servers


def prepare(
    config: ServerConfig, servers: Sequence[RemoteServer], note: Note | None = None
) -> list[Request]:
    """The prompts as requests. Raises `UserError` where one leaves no room for its answer."""
    requests = load_requests(config, servers[0], max(server.k for server in servers), note)
    for load in config.loads:
        round_size(config, load, len(requests))
    for request in requests:
        ids = request.prompt
        for server in servers:
            room = (server.max_model_len or 0) - config.max_tokens
            if isinstance(ids, list) and server.max_model_len and len(ids) > room:
                raise UserError(
                    f"the prompt has {len(ids):,} tokens, and the server at {server.url} has room "
                    f"for {server.max_model_len:,} with the {config.max_tokens:,} of the answer",
                    where=request.id,
                    hint="lower --max-tokens or give --max-prompt-tokens with --truncate-prompts",
                )
    return requests


def arms_of(servers: Mapping[str, RemoteServer], drafts: Mapping[str, Arm]) -> dict[str, Arm]:
    """The arms by name; what a server drafts with is unknown but where `drafts` says."""
    return {
        name: drafts.get(name) or Arm(name, None if decodes_plainly(name, server) else "unknown")
        for name, server in servers.items()
    }


def known_before(
    config: ServerConfig,
    servers: Mapping[str, RemoteServer],
    requests: Sequence[Request],
    drafts: Mapping[str, Arm],
) -> dict[str, list[str]]:
    """What is known of each arm before any load, and a reader should know."""
    longest = max((len(r.prompt) for r in requests if isinstance(r.prompt, list)), default=0)
    every = [*_roots(servers), *_left_out(config)]
    return {
        name: [
            *foreseen(arm, config.target, longest, config.max_tokens),
            *_uncounted(name, servers[name]),
            *every,
        ]
        for name, arm in arms_of(servers, drafts).items()
    }


def _uncounted(name: str, server: RemoteServer) -> list[str]:
    if server.counted:
        return []
    found = [
        f"{name}: nobody counts its drafts and requests (no page with vLLM's counters), so "
        "acceptance is not known but from answers that bring it, nor whether others used the server"
    ]
    if decodes_plainly(name, server):
        found.append(f"{name}: that it decodes without speculation is only what its name says")
    return found


def _roots(servers: Mapping[str, RemoteServer]) -> list[str]:
    """Servers of one tokenizer need not serve one model, nor call it by one path where they do."""
    roots = {name: server.root for name, server in servers.items()}
    if len(set(roots.values())) < 2:
        return []
    listed = ", ".join(f"{name} {root}" for name, root in roots.items())
    return [
        f"The servers name different models ({listed}). Their tokens are the same as far as they "
        "show; whether their weights are, nobody checked"
    ]


def _left_out(config: ServerConfig) -> list[str]:
    """What follows from fields that requests go without."""
    found = []
    if sampling := [name for name in ("temperature", *NEUTRAL) if name in config.omitted]:
        found.append(f"Requests say nothing of {', '.join(sampling)}: the servers' own hold")
    if "cache_salt" in config.omitted and not config.reuse_prefixes:
        found.append("Requests have no cache_salt: prompts that come again may hit a prefix cache")
    return found


def explain_differences(
    config: ServerConfig,
    results: Sequence[Sequence[LoadRun]],
    requests: Sequence[Request],
    plain: RemoteServer | None,
    progress: Progress,
) -> Explained:
    """Where greedy outputs at concurrency 1 part from those without speculation, explained.

    None when there is nothing to compare: sampled outputs, no such load, or no token ids.
    """
    alone = next((runs for runs in results if runs[0].load.concurrency == 1), None)
    if alone is None or plain is None or config.temperature > 0:
        return None, None
    found = first_differences(alone, [request.id for request in requests])
    if found is None or not any(found.values()):
        return found, None
    none = next(run for run in alone if run.plain)
    answered = [
        (request, answer)
        for request, answer in zip(requests, none.answers[: none.prompts], strict=False)
        if not answer.error
    ]
    ids = {request.id: request.prompt for request, _ in answered}
    tokens = {name: prompt for name, prompt in ids.items() if isinstance(prompt, list)}
    if len(tokens) < len(ids):  # text or chat: its token ids are the server's secret
        return found, None
    outputs = {request.id: list(answer.token_ids or []) for request, answer in answered}
    differences, noise = explain(
        ServerEngine(plain),
        tokens,
        outputs,
        found,
        lambda done, total: progress("explaining differences", done, total),
    )
    assert config.target  # whose tokenizer made the ids
    return with_texts(differences, config.target.folder), noise


def finish(
    config: ServerConfig,
    results: Sequence[Sequence[LoadRun]],
    servers: Mapping[str, RemoteServer],
    requests: Sequence[Request],
    drafts: Mapping[str, Arm],
    explained: Explained,
    threads: Mapping[str, int],
) -> Report:
    """The report of all that was measured."""
    arms = arms_of(servers, drafts)
    common = _common(config, servers, requests)
    if len(set(threads.values())) == 1:  # of one kind of server on one machine
        common["threads"] = next(iter(threads.values()))
    report = build_server_report(
        results,
        arms=arms,
        common=common,
        provenance={
            name: _arm_provenance(arms[name], common, server) for name, server in servers.items()
        },
        prompts=[request.id for request in requests],
        categories=[request.category for request in requests],
        prompt_tokens=[
            len(request.prompt) if isinstance(request.prompt, list) else None
            for request in requests
        ],
        warnings=known_before(config, servers, requests, drafts),
        differences=explained[0],
        noise=explained[1],
        seed=config.seed,
    )
    report.example = example_of(config, results[0], requests)
    warn(report, trained_on_warnings(list(arms.values()), [request.root for request in requests]))
    return report


def example_of(
    config: ServerConfig, runs: Sequence[LoadRun], requests: Sequence[Request]
) -> dict[str, Any] | None:
    """The first prompt that was answered, with that answer; without speculation where there is."""
    run = next((run for run in runs if run.plain), runs[0])
    answered = zip(requests, run.answers, strict=False)
    request, answer = next(((r, a) for r, a in answered if a.error is None), (None, None))
    if request is None or answer is None:
        return None
    turns = request.messages or []
    prompt = request.prompt or "".join(
        f"{turn['role']}: {turn.get('content') or ''}\n" for turn in turns
    )
    target = config.target.folder if config.target else None
    return example(request.id, prompt, answer.text, target)


def _common(
    config: ServerConfig, servers: Mapping[str, RemoteServer], requests: Sequence[Request]
) -> dict[str, Any]:
    """What all arms share; versions and machine are those of the client."""
    settings = {
        **config.settings(),
        "k": max(server.k for server in servers.values()),
        "prompts": len(requests),
        "prompts_sha256": content_hash(requests),
    }
    settings |= suite_record(config, config.prompts)
    settings |= template_record(config.target, config)
    if config.target is not None:
        return common_provenance(config.target, settings)
    return {
        "target": {"path": next(iter(servers.values())).root, "sha256": None},
        **settings,
        **circumstances(),
    }


def _arm_provenance(arm: Arm, common: dict[str, Any], server: RemoteServer) -> dict[str, Any]:
    own = {
        "method": None if decodes_plainly(arm.name, server) else "not known",
        "k": server.k or None,
        "server": server.url,
        "model": server.model,
        "server_vllm": server.version,
    }
    if not isinstance(arm.draft, DraftInfo):
        return {**common, **own, "draft": None}
    return {**arm_provenance(arm, common, own), "method": arm.draft.method}
