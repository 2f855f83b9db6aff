"""The parts of a capture: stores of their own, which are joined in the end."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from itertools import count
from pathlib import Path

from afaspec.capture.plan import CapturePlan, hash_of
from afaspec.store.manifest import NAME, Manifest, read_manifest
from drafts.files import make_folder

FOLDER = "parts"  # in the store's folder until they are joined
SIZE = "part_prompts"  # of a manifest's settings


def folder_of(out: Path, number: int) -> Path:
    return out / FOLDER / f"{number:05d}"


def part_of(plan: CapturePlan, number: int, size: int, batch_size: int) -> CapturePlan:
    """A capture of `size` of the plan's prompts, into a store of its own.

    What it captures depends on its prompts and their place alone, whoever does it and when.
    """
    first = number * size
    prompts = plan.prompts[first : first + size]
    out = folder_of(plan.config.out, number)
    changes = {"out": out, "batch_size": batch_size, "overwrite": False}
    config = plan.config.model_copy(update=changes)
    return replace(
        plan, config=config, prompts=prompts, prompts_sha256=hash_of(prompts), first=first
    )


def is_done(out: Path, number: int) -> bool:
    folder = folder_of(out, number)
    return (folder / NAME).is_file() and read_manifest(folder).complete


def begin(out: Path, manifest: Manifest) -> None:
    """Say what the parts are of."""
    make_folder(out / FOLDER)
    manifest.write(out / FOLDER)


def begun(out: Path) -> Manifest | None:
    """What the parts that lie there are of; None where there are none."""
    there = (out / FOLDER / NAME).is_file()
    return read_manifest(out / FOLDER) if there else None


def remove(out: Path) -> None:
    """Remove a store and its parts, the manifest first."""
    (out / NAME).unlink(missing_ok=True)
    for shard in out.glob("shard-*.safetensors"):
        shard.unlink()
    shutil.rmtree(out / FOLDER, ignore_errors=True)


def join(out: Path, manifest: Manifest, parts: int) -> None:
    """Make one store of the finished parts: `manifest` with their shards, in their order.

    Files are moved, not copied. A kill in between costs nothing: what has been moved is found where
    it belongs, and the parts are forgotten last.
    """
    numbers = count()
    for part in range(parts):
        folder = folder_of(out, part)
        for shard in read_manifest(folder).shards:
            own = out / f"shard-{next(numbers):05d}.safetensors"
            if (folder / shard.file).exists():
                os.replace(folder / shard.file, own)
            manifest.shards.append(replace(shard, file=own.name))
    manifest.complete = True
    manifest.write(out)
    shutil.rmtree(out / FOLDER)
