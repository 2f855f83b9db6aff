"""The feature store: token ids, loss masks and hidden states of one target, in shards on disk."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from afaspec.store.int8 import from_int8, groups
from afaspec.store.manifest import CAPTURE_AGAIN, Manifest, ShardRecord, read_manifest
from drafts.errors import UserError
from drafts.hashes import hash_file
from drafts.tensors import read_header

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Sequence:
    """One prompt with its response, or a conversation with its turns.

    input_ids int64 [n]; loss_mask bool [n], true on the assistant's tokens that are trained, in as
    many stretches as turns; several sequences may have one `prompt_index`. hidden bf16
    [n, layers * d], the states after the store's `layer_ids`, side by side; final bf16 [n, d],
    what lm_head sees.
    """

    input_ids: Tensor
    loss_mask: Tensor
    hidden: Tensor
    final: Tensor
    prompt_index: int

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])


class FeatureStore:
    """Sequences by number; tensors stay on disk, memory-mapped, until they are read."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self._ends = list(accumulate(shard.sequences for shard in manifest.shards))
        self._shards: dict[int, _Shard] = {}

    @classmethod
    def open(
        cls, folder: Path | str, *, allow_incomplete: bool = False, verify: bool = False
    ) -> FeatureStore:
        """Check every shard's size and header (with `verify` also its hash) and open the store.

        Raises `UserError` for a missing, damaged or (unless allowed) unfinished store.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise UserError("no such folder", where=folder, hint="give a store of afaspec capture")
        manifest = read_manifest(folder)
        if not manifest.complete and not allow_incomplete:
            raise UserError(
                f"is not finished: {manifest.sequences} sequences are there so far",
                where=folder,
                hint="run the same afaspec capture again; it goes on where it stopped",
            )
        for shard in manifest.shards:
            check_shard(folder, shard, manifest, verify)
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Sequence]:
        return map(self.__getitem__, range(len(self)))

    @property
    def tokens(self) -> int:
        return self.manifest.tokens

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        shards = [self._shard(number) for number in range(len(self._ends))]
        return [int(n) for shard in shards for n in shard.offsets.diff()]

    @property
    def prompts(self) -> int:
        """How many prompts the sequences are of."""
        shards = [self._shard(number) for number in range(len(self._ends))]
        return len({int(i) for shard in shards for i in shard.prompt_index})

    @property
    def roots(self) -> list[int] | None:
        """Where each sequence's prompt begins (`Prompt.root`); None if the store does not say."""
        found = [self._shard(number).root for number in range(len(self._ends))]
        known = [roots for roots in found if roots is not None]
        return (
            [int(root) for roots in known for root in roots] if len(known) == len(found) else None
        )

    def prompt_ids(self, index: int) -> tuple[int, ...]:
        """The token ids that a sequence was not trained to write."""
        number, i = self._place(index)
        return self._shard(number).prompt_ids(i)

    def __getitem__(self, index: int) -> Sequence:
        number, i = self._place(index)
        return self._shard(number).sequence(i)

    def _place(self, index: int) -> tuple[int, int]:
        """The number of a sequence's shard, and its own in there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self._ends, index)
        return number, index - (self._ends[number - 1] if number else 0)

    def length(self, index: int) -> int:
        """Tokens of a sequence."""
        number, i = self._place(index)
        offsets = self._shard(number).offsets
        return int(offsets[i + 1] - offsets[i])

    def tokens_at(self, index: int) -> tuple[Tensor, Tensor]:
        """Ids and mask of a sequence alone, whose states stay on disk."""
        number, i = self._place(index)
        return self._shard(number).tokens(i)

    def _shard(self, number: int) -> _Shard:
        if number not in self._shards:
            self._shards[number] = _Shard(self.folder / self.manifest.shards[number].file)
        return self._shards[number]

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay behind when a store is sent to a worker process."""
        return {**self.__dict__, "_shards": {}}


class _Shard:
    def __init__(self, path: Path):
        import torch
        from safetensors import safe_open

        self._file = safe_open(path, framework="pt")
        self._torch = torch
        self.offsets = self._file.get_tensor("offsets").clone()
        self.prompt_index = self._file.get_tensor("prompt_index").clone()
        names = self._file.keys()
        self.root = self._file.get_tensor("root").clone() if "root" in names else None
        self._scaled = "final_scale" in names

    def prompt_ids(self, i: int) -> tuple[int, ...]:
        start, end = int(self.offsets[i]), int(self.offsets[i + 1])
        ids, mask = (self._file.get_slice(n)[start:end] for n in ("input_ids", "loss_mask"))
        return tuple(ids[mask == 0].tolist())

    def sequence(self, i: int) -> Sequence:
        ids, mask = self.tokens(i)
        hidden, final = self._states("hidden", i), self._states("final", i)
        return Sequence(ids, mask, hidden, final, int(self.prompt_index[i]))

    def tokens(self, i: int) -> tuple[Tensor, Tensor]:
        ids, mask = self._part("input_ids", i), self._part("loss_mask", i)
        return ids.to(self._torch.int64), mask.to(self._torch.bool)

    def _states(self, name: str, i: int) -> Tensor:
        states = self._part(name, i)
        return from_int8(states, self._part(f"{name}_scale", i)) if self._scaled else states

    def _part(self, name: str, i: int) -> Tensor:
        return self._file.get_slice(name)[int(self.offsets[i]) : int(self.offsets[i + 1])]


def check_shard(folder: Path, shard: ShardRecord, manifest: Manifest, verify: bool) -> None:
    """Raise `UserError` unless the shard's file is there, whole and of the promised shapes."""
    path = folder / shard.file
    if not path.is_file():
        raise UserError("this shard is missing", where=path, hint=CAPTURE_AGAIN)
    size = path.stat().st_size
    if size != shard.bytes:
        raise UserError(
            f"this shard has {size:,} bytes, the manifest promises {shard.bytes:,}",
            where=path,
            hint=CAPTURE_AGAIN,
        )
    d, n, s = manifest.target["hidden_size"], shard.tokens, shard.sequences
    expected: dict[str, tuple[str, tuple[int, ...]]] = {
        "input_ids": ("I32", (n,)),
        "loss_mask": ("U8", (n,)),
        "offsets": ("I64", (s + 1,)),
        "prompt_index": ("I32", (s,)),
    }
    for name, width in (("hidden", len(manifest.layer_ids) * d), ("final", d)):
        expected[name] = ("bfloat16" if manifest.features == "bf16" else "I8", (n, width))
        if manifest.features == "int8":
            expected[f"{name}_scale"] = ("bfloat16", (n, groups(width)))
    found = {name: (header.dtype, header.shape) for name, header in read_header(path).items()}
    if "root" in found:  # older stores have none
        expected["root"] = ("I64", (s,))
    if found != expected:
        wrong = next(k for k in {**expected, **found} if found.get(k) != expected.get(k))
        raise UserError(
            f"tensor {wrong} is {found.get(wrong, 'missing')}, expected "
            f"{expected.get(wrong, 'no such tensor')}",
            where=path,
            hint=CAPTURE_AGAIN,
        )
    if verify and hash_file(path) != shard.sha256:
        raise UserError(
            "this shard's content has changed since it was captured (its SHA-256 differs)",
            where=path,
            hint=CAPTURE_AGAIN,
        )
