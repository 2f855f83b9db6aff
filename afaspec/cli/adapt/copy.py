"""`afaspec copy`: a feature store to or from a bucket, a server, another folder."""

from __future__ import annotations

from pydantic import Field

from afaspec.cli.flags import configured
from bench.records.settings import Settings


class CopyConfig(Settings):
    """From where, and to where."""

    source: str = Field(description="folder or address of a finished store")
    to: str = Field(description="folder or address, such as s3://bucket/store")


@configured(CopyConfig, arguments=("source", "to"))
def copy(config: CopyConfig) -> None:
    """Copy the feature store SOURCE to TO: folders, or addresses of any kind that fsspec knows.

    Each shard's SHA-256 is checked on its way. The same command goes on with a copy that was
    interrupted, and brings what a store has grown by. Credentials are those of fsspec's packages
    (s3fs, gcsfs, adlfs), which you install for them.

    [bold]Examples[/]

      afaspec copy runs/store s3://bucket/stores/general

      afaspec copy s3://bucket/stores/general runs/general

      afaspec copy https://example.com/stores/general runs/general
    """
    from afaspec.cli.console import note, progress
    from afaspec.store.copy import copy_store

    with progress() as bars:
        task = bars.add_task("copying", total=None, unit="MiB")

        def show(done: int, total: int) -> None:
            bars.update(task, completed=done / 2**20, total=total / 2**20)

        manifest = copy_store(config.source, config.to, show)
    note(f"{config.to}: {manifest.sequences:,} sequences, {manifest.tokens:,} tokens")
