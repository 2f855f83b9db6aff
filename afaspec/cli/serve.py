"""`afaspec serve`: an OpenAI-compatible vLLM server with speculation."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from afaspec.cli.flags import TargetAdapter

if TYPE_CHECKING:
    from drafts.checkpoint.info import DraftInfo


def serve(
    target: Annotated[
        str, typer.Argument(help="The target's folder, or `embedded`.", show_default=False)
    ],
    vllm_flags: Annotated[
        list[str] | None,
        typer.Argument(help="Flags for vLLM, after `--`.", show_default=False),
    ] = None,
    draft: Annotated[
        str,
        typer.Option(help="The draft's folder, `embedded-draft`, `ngram`, or `none`."),
    ] = "none",
    target_adapter: TargetAdapter = None,
    k: Annotated[int, typer.Option("--k", help="Speculative tokens per step.", min=1)] = 3,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 takes a free one.", min=0, max=65535)
    ] = 8000,
    cache_gib: Annotated[
        float, typer.Option(help="Size of the KV cache on CPU machines, in GiB.", min=0.1)
    ] = 1.0,
    log: Annotated[
        Path | None,
        typer.Option(help="File for vLLM's output.", show_default="a temporary file"),
    ] = None,
) -> None:
    """Serve TARGET with a draft through vLLM, after checking that the two fit.

    Ctrl-C or SIGTERM ends vLLM and all its children.

    [bold]Examples[/]

        afaspec serve embedded --draft embedded-draft

        afaspec serve models/Llama-3.1-8B-Instruct --draft runs/merged --k 4

        afaspec serve embedded --draft runs/demo/afa-lora-merged -- --max-model-len 2048
    """
    from afaspec.capture.adapted_target import resolve_target
    from afaspec.cli.console import console, note
    from drafts.target import read_target
    from serving.server.serve import serve as run

    code = run(
        read_target(resolve_target(target, target_adapter, note)),
        _drafter(draft),
        k,
        host,
        port,
        vllm_flags or (),
        cache_gib=cache_gib,
        log=log,
        console=console,
    )
    raise typer.Exit(code)


def _drafter(draft: str) -> DraftInfo | Literal["ngram"] | None:
    from afaspec.embedded.names import resolve_model
    from drafts.registry import read_draft

    if draft == "none":
        return None
    return "ngram" if draft == "ngram" else read_draft(resolve_model(draft))
