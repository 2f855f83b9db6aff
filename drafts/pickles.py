"""Weights that are published as pickles alone: read as tensors, written as safetensors."""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drafts.errors import UserError, first_line
from drafts.files import read_json, write_json
from drafts.tensors import PICKLES

if TYPE_CHECKING:
    from torch import Tensor


USUAL, INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
OF_TRAINING = re.compile(r"training_args|optimizer|scheduler|rng_state|random_states")
MASK_EMBEDDING = "mask_embedding.pt"  # of DFlash: it is no state dict, and the family refuses it
AGAIN = "download the file again, or save the weights with safetensors where they were trained"


def find_pickles(folder: Path) -> list[Path]:
    """The files that hold the weights of a folder without safetensors; [] where there are none.

    Raises `UserError` where it cannot be told which they are, and for shards that are missing.
    """
    if any(folder.glob("*.safetensors")):
        return []
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX).get("weight_map") or {}
        shards = sorted({Path(str(name)).name for name in weight_map.values()})
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing or not shards:
            named = f"{missing[0]}, which is not there" if missing else "no files"
            raise UserError(f"names {named}", where=folder / INDEX, hint=AGAIN)
        return [folder / name for name in shards]
    pickled = sorted(path for path in folder.glob("*") if path.suffix in PICKLES)
    found = [p for p in pickled if not OF_TRAINING.match(p.name) and p.name != MASK_EMBEDDING]
    usual = [path for path in found if path.name == USUAL]
    if len(found) > 1 and not usual:
        raise UserError(
            f"holds several pickles ({', '.join(path.name for path in found)}), and no {INDEX} "
            "that says which are its weights",
            where=folder,
            hint="leave the one with the weights in the folder",
        )
    return usual or found


def unpickle(folder: Path, out: Path) -> None:
    """Write the model in `folder` to the empty folder `out`, its pickles as safetensors.

    Raises `UserError` for a pickle that holds anything but tensors; none of it is run.
    """
    from safetensors.torch import save_file

    paths = find_pickles(folder)
    index: dict[str, str] = {}
    for number, path in enumerate(paths, 1):
        name = f"model-{number:05}-of-{len(paths):05}.safetensors"
        state = load_pickle(path)
        try:
            save_file(state, out / (name if len(paths) > 1 else "model.safetensors"))
        except Exception as error:  # a type that safetensors has not
            raise UserError(
                f"cannot be written as safetensors ({first_line(error)})", where=path, hint=AGAIN
            ) from error
        index |= dict.fromkeys(state, name)
    if len(paths) > 1:
        write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    for path in folder.iterdir():
        kept = path not in paths and path.name != INDEX and not OF_TRAINING.match(path.name)
        if path.is_file() and kept:
            shutil.copyfile(path, out / path.name)


def load_mask_embedding(path: Path, token: int) -> Tensor:
    """DFlash's embedding of the mask `token`, [d]: alone in the file, or beside the token."""
    found = _load(path)
    if isinstance(found, Mapping):
        if found.get("mask_token_id", token) != token:
            raise UserError(
                f"is of the mask token {found['mask_token_id']}, config.json names {token}",
                where=path,
                hint=AGAIN,
            )
        found = found.get("embedding")
    if not is_plain(found):
        raise UserError(
            f"holds {type(found).__name__}, expected one embedding", where=path, hint=AGAIN
        )
    embedding: Tensor = found.detach().reshape(-1)
    return embedding


def load_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict by name, each with storage of its own."""
    found = _load(path)
    if not isinstance(found, Mapping) or not found:
        raise UserError(
            f"holds {type(found).__name__}, expected tensors by name", where=path, hint=AGAIN
        )
    for name, value in found.items():
        if not isinstance(name, str) or not is_plain(value):
            raise UserError(
                f"holds {type(value).__name__} under {name!r}, expected plain tensors by name",
                where=path,
                hint=AGAIN,
            )
    return {name: tensor.detach().contiguous().clone() for name, tensor in found.items()}


def _load(path: Path) -> Any:
    """What a pickle holds that asks for nothing but tensors and what torch knows to be safe."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files raise a dozen kinds; torch's advice is to run them
        asked = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it asks for {asked[1]}" if asked else type(error).__name__
        raise UserError(
            f"cannot be read as a pickle of tensors alone ({why}); nothing of it was run",
            where=path,
            hint=AGAIN,
        ) from None


def is_plain(value: Any) -> bool:
    """A dense tensor of values: not a sparse, a quantized or a nested one, nor one without data."""
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout != torch.strided:
        return False
    return not (value.is_quantized or value.is_meta or value.is_nested)
