"""Pack a model folder into the package's assets, and unpack it into the cache, once."""

from __future__ import annotations

import shutil
from pathlib import Path

from drafts.errors import UserError
from drafts.files import atomic_folder, cache_folder, read_json, write_json
from drafts.hashes import hash_model

ASSETS = Path(__file__).parent / "assets"


def pack(model: Path, asset: Path, bits: int) -> None:
    """Write `model` (config, tokenizer, float safetensors) to `asset`, its matrices packed."""
    from safetensors.torch import load_file, save_file

    from afaspec.embedded.quantize import pack_state, quantization_config

    with atomic_folder(asset) as folder:
        state = load_file(model / "model.safetensors")
        save_file(pack_state(state, bits), folder / "model.safetensors", metadata={"format": "pt"})
        config = read_json(model / "config.json")
        write_json(
            folder / "config.json", config | {"quantization_config": quantization_config(bits)}
        )
        _copy_texts(model, folder)


def unpack(name: str, assets: Path = ASSETS) -> Path:
    """The plain bf16 model `name` (target or draft) in the cache folder, unpacked if need be."""
    asset = assets / name
    if not (asset / "config.json").exists():
        raise UserError(
            f"this installation ships no embedded {name}",
            where=asset,
            hint="run `afaspec build-embedded`, or reinstall afaspec",
        )
    folder = cache_folder() / "embedded" / hash_model(asset)[:16] / name
    if not folder.exists():
        unpack_to(asset, folder)
    return folder


def unpack_to(asset: Path, folder: Path) -> None:
    """Unpack `asset` to `folder`, whole or not at all."""
    from safetensors.torch import load_file, save_file

    from afaspec.embedded.quantize import packed_bits, unpack_state

    with atomic_folder(folder) as temporary:
        config = read_json(asset / "config.json")
        packed = load_file(asset / "model.safetensors")
        state = unpack_state(packed, packed_bits(config))
        save_file(state, temporary / "model.safetensors", metadata={"format": "pt"})
        del config["quantization_config"]
        write_json(temporary / "config.json", config | {"dtype": "bfloat16"})
        _copy_texts(asset, temporary)


def _copy_texts(source: Path, to: Path) -> None:
    """Tokenizer, generation config and template; not the files written anew."""
    for path in source.iterdir():
        if path.is_file() and path.name not in ("config.json", "model.safetensors", "README.md"):
            shutil.copyfile(path, to / path.name)
