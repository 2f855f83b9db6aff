"""Copying a safetensors file with other names and shapes, tensors left out, and tensors added.

What is kept keeps its bytes and its order, so that the opposite change gives the same file again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from drafts.tensors import BYTES

if TYPE_CHECKING:
    from torch import Tensor

METADATA = "__metadata__"
CHUNK = 1 << 24


@dataclass(frozen=True)
class Place:
    """What a tensor is called in the new file, and its shape there (as many values as before)."""

    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """A tensor of the new file; its data are a tensor, or from where to where in the old file."""

    place: Place
    dtype: str  # safetensors' code
    data: Tensor | tuple[int, int]

    @property
    def size(self) -> int:
        if isinstance(self.data, tuple):
            return self.data[1] - self.data[0]
        return self.data.nbytes


def rewrite(
    source: Path, destination: Path, places: Mapping[str, Place], added: Mapping[str, Tensor]
) -> None:
    """Copy the tensors of `source` that are in `places`, by their stored names, and `added` ones.

    The header is written compactly, the metadata as they were.
    """
    with source.open("rb") as file, destination.open("wb") as new:
        entries = read_entries(file)
        start = file.tell()
        metadata = entries.pop(METADATA, None)
        parts = {
            name: Part(places[name], entry["dtype"], tuple(entry["data_offsets"]))
            for name, entry in entries.items()
            if name in places
        }
        laid = sorted(parts.values(), key=lambda part: part.data)
        for name, tensor in added.items():
            place = Place(name, tuple(tensor.shape))
            parts[name] = Part(place, dtype_code(tensor), tensor.cpu().contiguous())
            insert(laid, parts[name])
        offsets, end = {}, 0
        for part in laid:
            offsets[part.place.name] = [end, end := end + part.size]
        header: dict[str, Any] = {} if metadata is None else {METADATA: metadata}
        for part in parts.values():
            name, shape = part.place.name, list(part.place.shape)
            header[name] = {"dtype": part.dtype, "shape": shape, "data_offsets": offsets[name]}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)  # the data stays aligned
        new.write(len(text).to_bytes(8, "little") + text)
        for part in laid:
            if isinstance(part.data, tuple):
                for chunk in chunks(file, start + part.data[0], part.size):
                    new.write(chunk)
            else:
                new.write(raw_bytes(part.data))


def insert(laid: list[Part], new: Part) -> None:
    """Put `new` after the last part of values as wide as its own: what follows is narrower.

    So no tensor begins where values of its type cannot lie.
    """
    width = BYTES[new.dtype]
    wide = [i for i, part in enumerate(laid, 1) if BYTES.get(part.dtype, 1) >= width]
    laid.insert(max(wide, default=0), new)


def hash_tensor(file: Path, name: str) -> str:
    """SHA-256 of a stored tensor's bytes, in hex."""
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        start, end = read_entries(opened)[name]["data_offsets"]
        for chunk in chunks(opened, opened.tell() + start, end - start):
            digest.update(chunk)
    return digest.hexdigest()


def read_entries(file: BinaryIO) -> dict[str, Any]:
    """The header of a safetensors file that was checked before; leaves `file` at its data."""
    entries: dict[str, Any] = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return entries


def chunks(file: BinaryIO, start: int, size: int) -> Iterator[bytes]:
    file.seek(start)
    while size > 0 and (chunk := file.read(min(size, CHUNK))):
        size -= len(chunk)
        yield chunk


def raw_bytes(tensor: Tensor) -> memoryview:
    import torch

    return tensor.flatten().view(torch.uint8).numpy().data


def dtype_code(tensor: Tensor) -> str:
    """safetensors' name of a tensor's type."""
    import torch

    codes = {
        torch.bool: "BOOL",
        torch.bfloat16: "BF16",
        torch.float16: "F16",
        torch.float32: "F32",
        torch.float64: "F64",
    }
    return codes[tensor.dtype]
