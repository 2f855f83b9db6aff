"""`afaspec merge`: turn a finished adapter into a plain draft."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from afaspec.cli.flags import TargetAdapter


def merge(
    trained: Annotated[Path, typer.Argument(help="Run folder of `afaspec train`, or an adapter.")],
    out: Annotated[Path, typer.Option(help="Folder for the merged draft.")],
    draft: Annotated[
        Path | None, typer.Option(help="Base draft (default: the one the run names).")
    ] = None,
    target: Annotated[
        Path | None, typer.Option(help="Target, for drafts that share its embedding.")
    ] = None,
    target_adapter: TargetAdapter = None,
) -> None:
    """Merge a finished adapter into its base draft, in the base's own format.

    Refuses an adapter whose annealing has not reached beta = 0. Vocabulary map and untouched
    tensors keep their bytes. vLLM loads the result like the base.

    [bold]Examples[/]

      afaspec merge runs/afa --out runs/afa/merged

      afaspec merge ADAPTER --draft BASE --target TARGET --out MERGED
    """
    from afaspec.capture.adapted_target import resolve_optional
    from afaspec.checkpoints.merge import merge as run
    from afaspec.cli.console import console, note
    from afaspec.embedded.names import model_folder

    with console.status("merging and measuring parity"):
        adapted = resolve_optional(target, target_adapter, note)
        parity = run(trained, draft and model_folder(draft), out, adapted)
    console.print(
        f"{out}: {parity.changed_tensors} tensors merged, {parity.untouched_tensors} kept as they "
        f"were. Parity with the adapter: {parity.float32:.1e} relative in float32, "
        f"{parity.stored:.1e} as stored ({parity.dtype})."
    )
