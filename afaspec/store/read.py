"""The feature store: token ids, loss masks and hidden states of one target, in shards on disk."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from afaspec.store.int8 import from_int8, groups
from afaspec.store.manifest import (
    CAPTURE_AGAIN,
    Manifest,
    ShardRecord,
    hash_prompt,
    read_manifest,
)
from drafts.errors import UserError
from drafts.hashes import hash_file
from drafts.tensors import Header, read_header

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


Column = Literal["length", "prompt_index", "root", "prompt_hash"]
OPEN = 64  # shards that are kept open: each is a memory map, and a process may have only so many


class FeatureStore:
    """Sequences by number; tensors stay on disk, memory-mapped, until they are read."""

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder, self.manifest = folder, manifest
        self._ends = list(accumulate(shard.sequences for shard in manifest.shards))
        self._shards: dict[int, _Shard] = {}
        self._headers: dict[int, dict[str, Header]] = {}
        self._lock = Lock()  # a thread reads ahead

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
        store = cls(folder, manifest)
        for number, shard in enumerate(manifest.shards):
            store._headers[number] = check_shard(folder, shard, manifest, verify)
        return store

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Sequence]:
        return map(self.__getitem__, range(len(self)))

    @property
    def tokens(self) -> int:
        return self.manifest.tokens

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each sequence."""
        return self._joined("length")

    @property
    def prompts(self) -> int:
        """How many prompts the sequences are of."""
        return len(np.unique(self._joined("prompt_index")))

    @property
    def roots(self) -> NDArray[np.int64] | None:
        """Where each sequence's prompt begins (`Prompt.root`); None if the store does not say."""
        return self._joined("root") if self.has_roots else None

    @property
    def has_roots(self) -> bool:
        return all("root" in self._header(number) for number in range(len(self._ends)))

    @property
    def prompt_hashes(self) -> NDArray[np.int64]:
        """Of each sequence's `prompt_ids`: the same where those are the same."""
        return self._joined("prompt_hash")

    def each(self, column: Column) -> Iterator[tuple[slice, NDArray[np.int64]]]:
        """One value of each sequence, shard by shard: of which sequences, and their values.

        None of a store's columns need be in memory whole: there may be millions of sequences.
        """
        start = 0
        for number, end in enumerate(self._ends):
            yield slice(start, end), self._column(number, column)
            start = end

    def _joined(self, column: Column) -> NDArray[np.int64]:
        found = np.empty(len(self), np.int64)
        for where, values in self.each(column):
            found[where] = values
        return found

    def _column(self, number: int, column: Column) -> NDArray[np.int64]:
        headers = self._header(number)
        if column == "length":
            return np.diff(_numbers(headers["offsets"]))
        if column == "prompt_hash" and column not in headers:  # older stores have none
            record = self.manifest.shards[number]
            ids = map(_Shard(self.folder / record.file).prompt_ids, range(record.sequences))
            return np.array([hash_prompt(one) for one in ids], np.int64)
        return _numbers(headers[column])

    def _header(self, number: int) -> dict[str, Header]:
        if number not in self._headers:
            self._headers[number] = read_header(self.folder / self.manifest.shards[number].file)
        return self._headers[number]

    def prompt_ids(self, index: int) -> tuple[int, ...]:
        """The token ids that a sequence was not trained to write."""
        number, i = self._place(index)
        return self._shard(number).prompt_ids(i)

    def __getitem__(self, index: int) -> Sequence:
        """Raises `UserError` for a store of texts alone."""
        if self.manifest.features == "none":
            raise UserError(
                "holds texts alone, no hidden states",
                where=self.folder,
                hint="capture them (no --features none); afaspec train reads them by itself",
            )
        number, i = self._place(index)
        return self._shard(number).sequence(i)

    def read(self, numbers: Iterable[int]) -> Iterator[Sequence]:
        """These sequences, one after another."""
        return map(self.__getitem__, numbers)

    def prompt_index(self, index: int) -> int:
        """The number of a sequence's prompt."""
        number, i = self._place(index)
        return int(self._shard(number).prompt_index[i])

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
        with self._lock:
            shard = self._shards.pop(number, None)
            if shard is None:
                shard = _Shard(self.folder / self.manifest.shards[number].file)
            self._shards[number] = shard  # the one used last
            if len(self._shards) > OPEN:
                del self._shards[next(iter(self._shards))]
        return shard

    def __getstate__(self) -> dict[str, Any]:
        """Open files stay behind when a store is sent to a worker process."""
        return {"folder": self.folder, "manifest": self.manifest}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _numbers(header: Header) -> NDArray[np.int64]:
    """A shard's tensor of a value for each sequence."""
    kind = {"I32": "<i4", "I64": "<i8"}[header.dtype]
    return np.fromfile(header.file, kind, prod(header.shape), offset=header.start)


class _Shard:
    def __init__(self, path: Path):
        import torch
        from safetensors import safe_open

        self._file = safe_open(path, framework="pt")
        self._torch = torch
        self.offsets = self._file.get_tensor("offsets").clone()
        self.prompt_index = self._file.get_tensor("prompt_index").clone()
        self._scaled = "final_scale" in set(self._file.keys())

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


def check_shard(
    folder: Path, shard: ShardRecord, manifest: Manifest, verify: bool
) -> dict[str, Header]:
    """The header of a shard. `UserError` unless it is there, whole and of the promised shapes."""
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
    states = {"hidden": len(manifest.layer_ids) * d, "final": d}
    for name, width in states.items() if manifest.features != "none" else ():
        expected[name] = ("bfloat16" if manifest.features == "bf16" else "I8", (n, width))
        if manifest.features == "int8":
            expected[f"{name}_scale"] = ("bfloat16", (n, groups(width)))
    headers = read_header(path)
    found = {name: (header.dtype, header.shape) for name, header in headers.items()}
    for name in {"root", "prompt_hash"} & found.keys():  # older stores have none
        expected[name] = ("I64", (s,))
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
    return headers
