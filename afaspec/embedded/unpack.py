"""Pack a model folder into the package's assets, and unpack it into the cache, once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from drafts.errors import UserError
from drafts.files import INDEX, TEXTS, atomic_folder, cache_folder, make_once, read_json, write_json
from drafts.hashes import hash_model
from drafts.tensors import FLOATS, open_tensors

if TYPE_CHECKING:
    from torch import Tensor

State = dict[str, "Tensor"]

ASSETS = Path(__file__).parent / "assets"
SMOLLM2_DRAFT = "smollm2-draft"
MADE_BY = {  # the command that makes what ships, by the name of its folder in `ASSETS`
    "target": "afaspec build-embedded",
    "draft": "afaspec build-embedded",
    SMOLLM2_DRAFT: "python tools/pack_draft.py DRAFT",
}


def pack(
    model: Path,
    asset: Path,
    bits: int,
    largest: int | None = None,
    without: frozenset[str] = frozenset(),
) -> int:
    """Write `model` (config, tokenizer, float safetensors) to `asset`, its matrices packed.

    The tensors `without` are left out, for `unpack` to add. Returns the bytes of the weights.
    Raises `UserError` for a model that is quantized already, does not divide into groups, or would
    take more than `largest` bytes: then nothing is written.
    """
    from safetensors.torch import save_file

    from afaspec.embedded.quantize import GROUP, pack_state, quantization_config

    config = read_json(model / "config.json")
    if "quantization_config" in config:
        raise UserError("is quantized already", where=model, hint="pack the model in plain floats")
    tensors = open_tensors(model)
    for name, header in tensors.headers.items():
        if header.dtype in FLOATS and len(header.shape) == 2 and header.shape[1] % GROUP:
            raise UserError(
                f"{name} is {list(header.shape)}: its columns make no whole groups of {GROUP}",
                where=header.file,
                hint=f"a packed model's widths are multiples of {GROUP}",
            )
    state = {name: tensors.load(name) for name in tensors.headers if name not in without}
    with atomic_folder(asset) as folder:
        file = folder / "model.safetensors"
        save_file(pack_state(state, bits), file, metadata={"format": "pt"})
        if largest is not None and (size := file.stat().st_size) > largest:
            raise UserError(
                f"takes {size / 1e6:.1f} MB when packed, and {largest / 1e6:.1f} MB may ship",
                where=model,
                hint="give a smaller one: a draft with a smaller vocabulary (afaspec init --vocab)",
            )
        packed = config | {"quantization_config": quantization_config(bits)}
        write_json(folder / "config.json", packed)
        _copy_texts(model, folder)
    return (asset / "model.safetensors").stat().st_size


def unpack(name: str, assets: Path = ASSETS, add: Callable[[State], State] | None = None) -> Path:
    """The plain bf16 model that ships as `assets`/`name`, in the cache, unpacked if need be.

    `add` gives the tensors that were left out, from those that are there.
    """
    asset = assets / name
    if not (asset / "config.json").exists():
        raise UserError(
            f"this installation ships no {name}",
            where=asset,
            hint=f"reinstall afaspec, or make it again: {MADE_BY[name]}",
        )
    folder = cache_folder() / "embedded" / hash_model(asset)[:16] / name
    return make_once(folder, partial(_unpack_into, asset, add=add))


def unpack_to(asset: Path, folder: Path) -> None:
    """Unpack `asset` to `folder`, whole or not at all."""
    with atomic_folder(folder) as temporary:
        _unpack_into(asset, temporary)


def _unpack_into(asset: Path, folder: Path, add: Callable[[State], State] | None = None) -> None:
    from safetensors.torch import load_file, save_file

    from afaspec.embedded.quantize import packed_bits, unpack_state

    config = read_json(asset / "config.json")
    packed = load_file(asset / "model.safetensors")
    state = unpack_state(packed, packed_bits(config))
    if add is not None:
        state |= add(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    del config["quantization_config"]
    write_json(folder / "config.json", config | {"dtype": "bfloat16"})
    _copy_texts(asset, folder)


def _copy_texts(source: Path, to: Path) -> None:
    """Tokenizer, generation config and template; not the files written anew."""
    for path in source.iterdir():
        if path.suffix in TEXTS and path.name not in ("config.json", INDEX):
            shutil.copyfile(path, to / path.name)
