"""How long does a swap take, and how long does the engine stand still for it?

    python docs/examples/swap_latency.py --out runs/swaps                       # SmolLM2
    python docs/examples/swap_latency.py embedded --draft embedded-draft --out runs/swaps

Clients ask all the time while two drafts of the same build take turns. Printed are median and worst
of the whole change, of the time that vLLM gave no token, and of a client's longest wait for one.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
import urllib.request
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file

from afaspec.capture.adapted_target import open_target
from afaspec.pairs.names import open_draft
from drafts.checkpoint.info import DraftInfo
from drafts.files import write_json
from drafts.registry import read_draft
from serving.server.process import ServerSettings
from serving.server.swappable import SwappableServer

PROMPTS = [f"Write {number} sentences about the sea." for number in range(2, 10)]


def another(draft: DraftInfo, folder: Path) -> DraftInfo:
    """A draft of the same build with other values."""
    shutil.copytree(draft.folder, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in sorted(tensors) if tensors[name].is_floating_point())
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return read_draft(folder)


def ask_on(url: str, over: threading.Event, waits: list[tuple[float, float]], number: int) -> None:
    """Ask without end; keep when each piece of an answer came, and how long after the last."""
    while not over.is_set():
        number += 1
        body = {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": 64, "temperature": 0}
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps(body | {"stream": True, "ignore_eos": True}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            last = 0.0
            for line in answer:
                if line.startswith(b"data: {"):
                    now = time.monotonic()
                    if last:
                        waits.append((now, now - last))
                    last = now


def main(
    target: Annotated[str, typer.Argument()] = "smollm2",
    draft: Annotated[str, typer.Option()] = "",
    out: Annotated[Path, typer.Option(help="Folder, new.")] = Path("runs/swaps"),
    swaps: Annotated[int, typer.Option()] = 40,
    clients: Annotated[int, typer.Option()] = 2,
) -> None:
    """Swap again and again under load."""
    out.mkdir(parents=True)
    first = open_draft(draft or f"{target}-draft")
    drafts = [another(first, out / "other"), first]
    settings = ServerSettings(open_target(target), first, port=0, log=out / "vllm.log")
    spans: list[tuple[float, float]] = []
    still: list[float] = []
    waits: list[tuple[float, float]] = []
    over = threading.Event()

    def said(line: object) -> None:
        if found := re.search(r"stood still for (\d+) ms", str(line)):
            still.append(float(found[1]))

    with SwappableServer(settings) as server:
        server.process.wait_ready()
        threads = [
            threading.Thread(target=ask_on, args=(server.process.url, over, waits, number))
            for number in range(clients)
        ]
        for thread in threads:
            thread.start()
        time.sleep(5)
        for number in range(swaps):
            began = time.monotonic()
            server.change(drafts[number % 2], "in-place", said)
            spans.append((began, time.monotonic()))
            time.sleep(1)
        over.set()
        for thread in threads:
            thread.join()
    around = [
        max((wait for at, wait in waits if began <= at <= ended + 2), default=0.0)
        for began, ended in spans
    ]
    others = [wait for at, wait in waits if not any(b <= at <= e + 2 for b, e in spans)]
    figures = {
        "the change, as whoever asked for it waits, ms": [1e3 * (e - b) for b, e in spans],
        "vLLM gives no token, ms": still,
        "a client's longest wait for a piece about it, ms": [1e3 * wait for wait in around],
        "a client's wait for a piece otherwise, ms": [1e3 * wait for wait in others],
    }
    table = Table(f"of {len(spans)} swaps", "median", "worst")
    for name, values in figures.items():
        if values:
            table.add_row(name, f"{median(values):.0f}", f"{max(values):.0f}")
    Console(width=100).print(table)
    write_json(out / "swaps.json", figures)


if __name__ == "__main__":
    typer.run(main)
