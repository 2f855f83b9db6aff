"""Writing a feature store shard by shard, so that a kill at any moment loses at most one shard."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import lock_descriptor

from afaspec.store.int8 import to_int8
from afaspec.store.manifest import Manifest, ShardRecord, hash_prompt
from drafts.errors import UserError
from drafts.files import atomic_file, make_folder
from drafts.hashes import hash_file

if TYPE_CHECKING:
    from torch import Tensor


class LockedError(UserError):
    """Another process holds a folder."""


class StoreWriter:
    """Appends batches; closes a shard at the first batch end past `shard_bytes`.

    Shards end where batches end, and a batch's bytes depend on nothing before it, so a resumed
    store is the same, byte for byte, as one that was never interrupted. `manifest` may already
    have shards: writing goes on after them. Call within `locked(folder)`.
    """

    def __init__(self, folder: Path, manifest: Manifest, shard_bytes: int):
        self.folder, self.manifest, self.shard_bytes = folder, manifest, shard_bytes
        self._clear()

    def prepare(self) -> None:
        """Remove what a killed or overwritten run left, then write the manifest."""
        listed = {shard.file for shard in self.manifest.shards}
        stale = [p for p in self.folder.glob("shard-*.safetensors") if p.name not in listed]
        self.manifest.write(self.folder)  # first: an old manifest must not name removed shards
        halves = self.folder.glob(".*tmp*")  # ours, and those that safetensors writes through
        for path in [*stale, *halves]:
            path.unlink()

    def append(
        self,
        input_ids: Sequence[Sequence[int]],
        masks: Sequence[Sequence[bool]],
        prompt_index: Sequence[int],
        hidden: Sequence[Tensor],
        final: Sequence[Tensor],
        roots: Sequence[int | None] = (),
    ) -> None:
        """Add one whole batch: per sequence its ids and loss mask (both [n]), the number of its
        prompt, and its features [n, layers * d] and [n, d] (CPU), where the store keeps them.

        `roots` say where the prompts begin (`Prompt.root`); a shard keeps them if all are known.
        """
        for ids, mask in zip(input_ids, masks, strict=True):
            assert len(ids) == len(mask)
            self._ids.extend(ids)
            self._mask.extend(map(int, mask))
            self._offsets.append(len(self._ids))
            prompt = [token for token, trained in zip(ids, mask, strict=True) if not trained]
            self._hashes.append(hash_prompt(prompt))
        self._index.extend(prompt_index)
        self._hidden.extend(hidden)
        self._final.extend(final)
        self._roots.extend(roots)
        if len(self._ids) * self.manifest.token_bytes >= self.shard_bytes:
            self.flush()

    def finish(self) -> None:
        """Write what is left and mark the store complete."""
        if self._index:
            self.flush()
        self.manifest.complete = True
        self.manifest.write(self.folder)

    def flush(self) -> None:
        """Write the open shard, then list it in the manifest."""
        import torch
        from safetensors.torch import save_file

        tensors = {
            "input_ids": torch.tensor(self._ids, dtype=torch.int32),
            "loss_mask": torch.tensor(self._mask, dtype=torch.uint8),
            "offsets": torch.tensor(self._offsets, dtype=torch.int64),
            "prompt_index": torch.tensor(self._index, dtype=torch.int32),
            "prompt_hash": torch.tensor(self._hashes, dtype=torch.int64),
        }
        kept = {"hidden": self._hidden, "final": self._final}
        for name, parts in kept.items() if self.manifest.features != "none" else ():
            states = torch.cat(parts).to(torch.bfloat16)
            if self.manifest.features == "bf16":
                tensors[name] = states
            else:
                tensors[name], tensors[f"{name}_scale"] = to_int8(states)
        if len(self._roots) == len(self._index) and None not in self._roots:
            tensors["root"] = torch.tensor(self._roots, dtype=torch.int64)
        path = self.folder / f"shard-{len(self.manifest.shards):05d}.safetensors"
        with atomic_file(path) as temporary:
            save_file(tensors, temporary)
            record = ShardRecord(
                file=path.name,
                sequences=len(self._index),
                tokens=len(self._ids),
                bytes=temporary.stat().st_size,
                sha256=hash_file(temporary),
                response_tokens=sum(self._mask),
            )
        self.manifest.shards.append(record)
        self.manifest.write(self.folder)
        self._clear()

    def _clear(self) -> None:
        self._ids: list[int] = []
        self._mask: list[int] = []
        self._offsets: list[int] = [0]
        self._hashes: list[int] = []
        self._index: list[int] = []
        self._hidden: list[Tensor] = []
        self._final: list[Tensor] = []
        self._roots: list[int | None] = []


@contextmanager
def locked(folder: Path, command: str = "afaspec capture") -> Iterator[None]:
    """Make `folder` and hold it for this process alone; a kill ends the lock with the process.

    A folder made here that is still empty when the block fails is removed again.
    """
    made = not folder.exists()
    make_folder(folder)
    handle = os.open(folder, os.O_RDONLY)
    try:
        if not lock_descriptor(handle, blocking=False):  # the folder's own: no lock file is left
            raise LockedError(
                f"another {command} is writing here",
                where=folder,
                hint="wait for it, end it, or choose another --out",
            )
        yield
    except BaseException:
        if made and not any(folder.iterdir()):
            folder.rmdir()
        raise
    finally:
        os.close(handle)
