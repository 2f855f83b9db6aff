"""How long a store of many millions of sequences takes to open, divide, shuffle and go on with.

The store is real in all that is read for this (headers, lengths, and where prompts begin); its
hidden states are holes in files that take no disk. Each measurement is a process of its own, which
also says how much memory it held at most.

    python docs/examples/large_store.py --out /tmp/large
    python docs/examples/large_store.py --sequences 1000000 --out /tmp/million
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from numpy.typing import NDArray

LAYERS, HIDDEN = (2, 15, 27), 576  # of SmolLM2-135M
SHARD = 5000  # sequences
BYTES = {"I64": 8, "I32": 4, "U8": 1, "BF16": 2}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the store; made where it is not there.")],
    sequences: Annotated[int, typer.Option(help="How many.")] = 10_000_000,
    step: Annotated[int, typer.Option(help="Optimizer step to go on from.")] = 1_000_000,
    measure: Annotated[bool, typer.Option(hidden=True)] = False,
) -> None:
    """Make a store of holes, measure it in a process of its own, and print one line."""
    if measure:
        return measured(out, step)
    if not (out / "manifest.json").exists():
        write(out, sequences)
    command = [sys.executable, __file__, "--out", str(out), "--step", str(step), "--measure"]
    for run in range(3):  # the first reads from disk
        print(f"run {run + 1}:", subprocess.run(command, stdout=-1, text=True, check=True).stdout)
    return None


def write(out: Path, sequences: int) -> None:
    from afaspec.store.manifest import Manifest, ShardRecord, TargetRecord

    out.mkdir(parents=True)
    generator = np.random.default_rng(0)
    target = TargetRecord(
        path="none", sha256="0" * 64, hidden_size=HIDDEN, vocab_size=49152, num_layers=30
    )
    manifest = Manifest(target, LAYERS, "bfloat16", {"temperature": 0.0}, complete=True)
    for number, start in enumerate(range(0, sequences, SHARD)):
        count = min(SHARD, sequences - start)
        lengths = generator.integers(50, 1500, count)
        tokens = int(lengths.sum())
        file = out / f"shard-{number:05d}.safetensors"
        size = write_shard(file, lengths, start, generator)
        manifest.shards.append(ShardRecord(file.name, count, tokens, size, "0" * 64, tokens // 2))
    manifest.write(out)


def write_shard(
    file: Path, lengths: NDArray[np.int64], start: int, generator: np.random.Generator
) -> int:
    """Write a shard whose states, ids and masks are holes; its size in bytes."""
    count, tokens = len(lengths), int(lengths.sum())
    known: dict[str, NDArray[np.generic]] = {
        "offsets": np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        "prompt_hash": generator.integers(0, 1 << 63, count, dtype=np.int64),
        "prompt_index": np.arange(start, start + count, dtype=np.int32),
        "root": generator.integers(0, 1 << 63, count, dtype=np.int64),
    }
    shapes: dict[str, tuple[str, list[int]]] = {
        "offsets": ("I64", [count + 1]),
        "prompt_hash": ("I64", [count]),
        "prompt_index": ("I32", [count]),
        "root": ("I64", [count]),
        "hidden": ("BF16", [tokens, len(LAYERS) * HIDDEN]),
        "final": ("BF16", [tokens, HIDDEN]),
        "input_ids": ("I32", [tokens]),
        "loss_mask": ("U8", [tokens]),
    }
    header, end = {}, 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + BYTES[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for name in known:
            output.write(known[name].tobytes())
        output.truncate(8 + len(text) + end)
    return 8 + len(text) + end


def measured(out: Path, step: int) -> None:
    """Print the seconds of each stage and the memory held at most."""
    import torch

    from afaspec.store.read import FeatureStore
    from afaspec.train.config import TrainConfig
    from afaspec.train.loader import draw, split_sequences
    from afaspec.train.mix import Part

    torch.set_num_threads(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    times = [time.perf_counter()]
    store = FeatureStore.open(out)
    times.append(time.perf_counter())
    config = TrainConfig(store=out, draft="none", out=out / "run")
    part = Part("", store, *split_sequences(store, config))
    times.append(time.perf_counter())
    drawn = draw([part], config, step)
    times.append(time.perf_counter())
    opened, divided, resumed = np.diff(times)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{len(store):,} sequences, {store.tokens:,} tokens in {len(store.manifest.shards):,} "
        f"shards: open {opened:.2f} s, divide {divided:.2f} s, draw step {step:,} {resumed:.2f} s "
        f"({len(drawn)} sequences); {most:.0f} MiB at most, {before:.0f} before it"
    )


if __name__ == "__main__":
    typer.run(main)
