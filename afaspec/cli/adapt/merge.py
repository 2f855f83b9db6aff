"""`afaspec merge`: turn a finished adapter into a plain draft."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from afaspec.cli.flags import configured
from afaspec.config import TargetAdapter
from bench.records.settings import OptionalModelName, Settings


class MergeConfig(Settings):
    """What is merged into what."""

    trained: Path = Field(description="run folder of `afaspec train`, or an adapter")
    out: Path = Field(description="folder for the merged draft")
    draft: OptionalModelName = Field(
        None, description="base draft (default: the one the run names)"
    )
    target: OptionalModelName = Field(
        None, description="target, for drafts that share its embedding (default: the run's)"
    )
    target_adapter: TargetAdapter = None


@configured(MergeConfig, arguments=("trained",))
def merge(config: MergeConfig) -> None:
    """Merge a finished adapter into its base draft, in the base's own format.

    Refuses an adapter whose annealing has not reached beta = 0. Vocabulary map and untouched
    tensors keep their bytes. vLLM loads the result like the base.

    [bold]Examples[/]

      afaspec merge runs/afa --out runs/afa/merged

      afaspec merge ADAPTER --draft BASE --target TARGET --out MERGED
    """
    from afaspec.capture.adapted_target import open_target_if_given
    from afaspec.checkpoints.merge import merge as run
    from afaspec.checkpoints.merge import recorded_draft, recorded_target
    from afaspec.cli.console import console, note, working
    from afaspec.pairs.names import open_draft

    with working("merging and measuring parity"):
        base = open_draft(config.draft) if config.draft else recorded_draft(config.trained)
        target = open_target_if_given(config.target, config.target_adapter, note)
        parity = run(config.trained, base, config.out, target or recorded_target(config.trained))
    console.print(
        f"{config.out}: {parity.changed_tensors} tensors merged, {parity.untouched_tensors} kept "
        f"as they were. Parity with the adapter: {parity.float32:.1e} relative in float32, "
        f"{parity.stored:.1e} as stored ({parity.dtype})."
    )
