"""`afaspec serve`: an OpenAI-compatible vLLM server with speculation."""

from __future__ import annotations

from pathlib import Path

import typer
from pydantic import Field

from afaspec.cli.flags import configured
from afaspec.cli.live.settings import Kept
from afaspec.config import TargetAdapter
from serving.speculation import WITHOUT_FOLDER, Drafter


class ServeConfig(Kept):
    """What is served, and where."""

    target: str = Field(description="the target's folder or hub id, `smollm2` or `embedded`")
    vllm_flags: list[str] = Field([], description="flags for vLLM, after `--`")
    target_adapter: TargetAdapter = None
    draft: str = Field(
        "none",
        description="the draft's folder or hub id, `smollm2-draft`, `embedded-draft`, `ngram`, "
        "`suffix`, `mtp` (the target's own layers), or `none`",
    )
    k: int | None = Field(
        None,
        ge=1,
        description="speculative tokens per step [default: 3; of DFlash and DSpark drafts all that "
        "they were made for]",
    )
    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    allow_no_key: bool = Field(
        False, description="let a server that others can reach do without VLLM_API_KEY"
    )
    ready_seconds: float = Field(1800.0, gt=0, description="how long vLLM may take to start")
    cache_gib: float = Field(1.0, ge=0.1, description="KV cache on CPU machines, in GiB")
    log: Path | None = Field(None, description="file for vLLM's output (default: a temporary one)")
    swappable: bool = Field(False, description="let `afaspec swap` change the draft meanwhile")
    admin_host: str = Field("127.0.0.1", description="address at which the draft is changed")
    admin_port: int = Field(0, ge=0, le=65535, description="its port; 0 takes a free one")
    drain_seconds: float = Field(
        600.0, gt=0, description="where another server takes over: how long requests may last"
    )
    collect: Path | None = Field(
        None, description="keep a share of the requests and answers in this folder"
    )


@configured(ServeConfig, arguments=("target", "vllm_flags"))
def serve(config: ServeConfig) -> None:
    r"""Serve TARGET with a draft through vLLM, after checking that the two fit.

    Ctrl-C or SIGTERM ends vLLM and all its children. Clients must send the key that VLLM_API_KEY
    holds; without one the server listens on this machine only. They call the model as TARGET says:
    `embedded`, the hub id, or the folder's name, unless vLLM is given --served-model-name.

    [bold]Examples[/]

      afaspec serve embedded --draft embedded-draft

      afaspec serve models/Llama-3.1-8B-Instruct --draft runs/merged --k 4

      afaspec serve embedded --draft runs/demo/afa-lora-merged -- --max-model-len 2048

      afaspec serve embedded --draft embedded-draft --swappable

      afaspec serve embedded --draft embedded-draft --collect traffic --sample-rate 0.05 \
        --redact '[\w.+-]+@[\w.-]+'
    """
    from afaspec.capture.adapted_target import open_target
    from afaspec.cli.console import console, note, working
    from afaspec.pairs.names import served_name
    from serving.server.admin import AdminSettings
    from serving.server.serve import serve as run
    from serving.speculation import usual_k

    with working("reading target and draft"):
        target = open_target(config.target, config.target_adapter, note)
        drafter = _drafter(config.draft)
    code = run(
        target,
        drafter,
        config.k or usual_k(drafter),
        config.host,
        config.port,
        config.vllm_flags,
        cache_gib=config.cache_gib,
        log=config.log,
        name=served_name(config.target, config.target_adapter),
        allow_no_key=config.allow_no_key,
        ready_seconds=config.ready_seconds,
        console=console,
        admin=AdminSettings(config.admin_host, config.admin_port) if config.swappable else None,
        drain_seconds=config.drain_seconds,
        collect=config.into(config.collect) if config.collect else None,
    )
    raise typer.Exit(code)


def _drafter(draft: str) -> Drafter:
    from afaspec.pairs.names import open_draft

    if draft == "none":
        return None
    return next((one for one in WITHOUT_FOLDER if one == draft), None) or open_draft(draft)
