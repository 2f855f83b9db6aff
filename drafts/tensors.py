"""The tensors of a model folder: headers checked against the file's real size, values on demand."""

from __future__ import annotations

import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from drafts.errors import UserError
from drafts.files import INDEX, read_index, weight_files

if TYPE_CHECKING:
    from torch import Tensor, device, dtype


Float = Literal["bfloat16", "float16", "float32"]  # what models are computed in
FLOATS: tuple[str, ...] = get_args(Float)
PICKLES = (".bin", ".pt", ".pth")
BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}
BYTES |= {"U64": 8, "U32": 4, "U16": 2, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def dtype_name(of: dtype) -> str:
    """A type's name as a model's config.json has it: `bfloat16`, not `torch.bfloat16`."""
    return str(of).removeprefix("torch.")


def has_bf16(on: device) -> bool:
    """Can this device multiply in bf16? On a CPU that cannot, it takes up to 100 times as long."""
    import torch

    if on.type == "cuda":
        return torch.cuda.is_bf16_supported()
    return on.type != "cpu" or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def fastest_float(on: device) -> Float:
    """What models are computed in there, where nothing else is asked for."""
    return "bfloat16" if has_bf16(on) else "float32"


@dataclass(frozen=True)
class Header:
    """One tensor's entry in a safetensors header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0  # of its bytes in the file


@dataclass(frozen=True)
class TensorFile:
    """All tensors of a folder's safetensors files, by name."""

    folder: Path
    headers: dict[str, Header]

    def load(self, name: str) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.headers[name].file, framework="pt") as file:
            return file.get_tensor(name)


def open_tensors(folder: Path) -> TensorFile:
    """Read and check the safetensors headers of `folder`. Raises `UserError` when damaged.

    Each tensor stands in one file, the one that an index names for it.
    """
    paths = weight_files(folder)
    if not paths:
        pickled = sorted(p.name for p in Path(folder).glob("*") if p.suffix in PICKLES)
        raise UserError(
            f"has no .safetensors file{f' (only {pickled[0]}, a pickle)' if pickled else ''}",
            where=folder,
            hint=f"write it with safetensors: afaspec convert {folder} --out NEW"
            if pickled
            else "give a folder of a model that was saved with safetensors",
        )
    headers: dict[str, Header] = {}
    for path in paths:
        found = read_header(path)
        if twice := sorted(headers.keys() & found.keys()):
            raise UserError(
                f"{twice[0]} stands in {headers[twice[0]].file.name} and in {path.name}",
                where=folder,
                hint="remove the file that is no part of the model",
            )
        headers |= found
    index = Path(folder) / INDEX
    for name, file in read_index(index).items() if index.exists() else ():
        if name not in headers or headers[name].file.name != file:
            raise UserError(
                f"names the tensor {name} in {file}, which has it not",
                where=index,
                hint="copy or download the model's files again: they are not of one model",
            )
    return TensorFile(Path(folder), headers)


def read_header(path: Path) -> dict[str, Header]:
    """A safetensors file's header, with its declared size checked against the file's."""
    damaged = "copy or download the file again"
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > size - 8:
            raise UserError("is truncated: its header is not whole", where=path, hint=damaged)
        try:
            entries: dict[str, Any] = json.loads(file.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise UserError("is not a safetensors file", where=path, hint=damaged) from None
    entries.pop("__metadata__", None)
    end = max((e["data_offsets"][1] for e in entries.values()), default=0)
    if size != 8 + length + end:
        raise UserError(
            f"is truncated or damaged: {size:,} bytes, its header promises {8 + length + end:,}",
            where=path,
            hint=damaged,
        )
    headers = {}
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        expected = prod(entry["shape"]) * BYTES.get(entry["dtype"], 0)
        if entry["dtype"] in BYTES and expected != stop - start:
            raise UserError(f"tensor {name} has a wrong size", where=path, hint=damaged)
        headers[name] = Header(
            path,
            NAMES.get(entry["dtype"], entry["dtype"]),
            tuple(entry["shape"]),
            8 + length + start,
        )
    return headers


def read_numbers(header: Header, kind: str) -> Any:
    """A tensor's numbers as a flat numpy array of type `kind`, read from the disk as used."""
    import numpy as np

    if not (count := prod(header.shape)):
        return np.empty(0, kind)
    return np.memmap(header.file, kind, "r", header.start, (count,))
