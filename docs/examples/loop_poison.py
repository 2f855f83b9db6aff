"""Ten drafts that must not serve, before the loop's gate: is each of them held back?

    python docs/examples/loop_poison.py --out runs/poison

Half of them learned from poisoned traffic (answers that the target never gave), half are the
running draft with damaged weights. The gate is the loop's own, in vLLM; it holds each against the
draft that serves. Printed is what it says; the exit status is 1 where it lets one pass.
"""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor

from afaspec.capture.adapted_target import open_target
from afaspec.cli.console import note
from afaspec.cli.live.loop import Teller
from afaspec.loop.adapt import Work, adapt, write_rows
from afaspec.loop.config import LoopConfig
from afaspec.loop.gate import judge
from afaspec.pairs.names import open_draft
from drafts.files import read_json, write_json
from drafts.registry import read_draft

WORDS = ("read", "write", "open", "close", "find", "count", "split", "join")
PROMPTS = [f"def {word}_{what}(" for word in WORDS for what in ("lines", "files", "names", "keys")]
TEXT = "path):\n    with open(path) as file:\n        return [line.strip() for line in file]\n"

Tensors = dict[str, Tensor]


def shuffled(draw: random.Random) -> str:
    """The words of an answer in another order."""
    words = TEXT.split(" ")
    draw.shuffle(words)
    return " ".join(words)


def noise(draw: random.Random) -> str:
    """Characters alone."""
    return "".join(chr(draw.randrange(33, 127)) for _ in range(len(TEXT)))


ANSWERS: dict[str, Callable[[random.Random], str]] = {
    "words in another order": shuffled,
    "one word again and again": lambda draw: "import " * 24,
    "characters at random": noise,
    "the same line again": lambda draw: "pass\n" * 8,
    "numbers": lambda draw: " ".join(str(draw.randrange(10**6)) for _ in range(20)),
}


def negated(tensors: Tensors) -> None:
    """Reads the target's states the wrong way round."""
    tensors["fc.weight"] = -tensors["fc.weight"]


def half_noise(tensors: Tensors) -> None:
    """All weights with as much noise as they have themselves."""
    torch.manual_seed(0)
    for name, value in tensors.items():
        if value.ndim == 2:
            drawn = torch.randn_like(value, dtype=torch.float32) * value.float().std()
            tensors[name] = (value.float() + drawn).to(value.dtype)


def silent_attention(tensors: Tensors) -> None:
    """Sees nothing but the last token."""
    tensors["midlayer.self_attn.o_proj.weight"].zero_()


def other_words(tensors: Tensors) -> None:
    """Says the neighbour of each word."""
    tensors["lm_head.weight"] = tensors["lm_head.weight"].roll(1, 0)


def slightly_worse(tensors: Tensors) -> None:
    """A twentieth of noise: hard to see."""
    torch.manual_seed(1)
    value = tensors["fc.weight"].float()
    drawn = torch.randn_like(value) * value.std() * 0.5
    tensors["fc.weight"] = (value + drawn).to(tensors["fc.weight"].dtype)


DAMAGES = (negated, half_noise, silent_attention, other_words, slightly_worse)


def main(
    target: Annotated[str, typer.Argument()] = "embedded",
    draft: Annotated[str, typer.Option()] = "embedded-draft",
    out: Annotated[Path, typer.Option(help="Folder; a run that was cut off goes on there.")] = Path(
        "runs/poison"
    ),
    steps: Annotated[int, typer.Option(help="Of training on poisoned traffic.")] = 40,
) -> None:
    """Make each draft, let the gate judge it."""
    out.mkdir(parents=True, exist_ok=True)
    serves, opened, draw = open_draft(draft), open_target(target), random.Random(0)
    known = out / "poison.json"  # what a run before has judged
    verdicts: dict[str, Any] = read_json(known) if known.exists() else {}

    def work(folder: Path) -> Work:
        config = LoopConfig(
            url="http://127.0.0.1:1", target=target, draft=draft, general="suite:builtin",
            traffic=out / "traffic", out=folder, steps=steps, trial_steps=1, gate_prompts=8,
            general_prompts=8, new_tokens=32, rows=len(PROMPTS), least_rows=1, eval_fraction=0.4,
        )  # fmt: skip
        return Work(config, opened, serves, 3, Teller(note).stage, note)

    def judged(name: str, cycle: Path, new: Path) -> None:
        verdict = judge(work(out), cycle, serves, read_draft(new))
        verdicts[name] = {"passed": verdict.passed, "words": verdict.words}
        note(f"{name}: {verdict.words}")
        write_json(known, verdicts)

    for number, (kind, answer) in enumerate(ANSWERS.items(), 1):
        name = f"learned from {kind}"
        if name in verdicts:
            continue
        cycle = out / f"traffic-{number}"
        write_rows([{"prompt": text, "response": answer(draw)} for text in PROMPTS], cycle)
        judged(name, cycle, adapt(work(out), cycle, serves).folder)
    for number, damage in enumerate(DAMAGES, 1):
        name = damage.__name__.replace("_", " ")
        if name in verdicts:
            continue
        cycle = out / f"weights-{number}"
        shutil.rmtree(cycle, ignore_errors=True)
        write_rows([{"prompt": text, "response": TEXT} for text in PROMPTS], cycle)
        shutil.copytree(serves.folder, cycle / "draft")
        tensors = load_file(cycle / "draft" / "model.safetensors")
        damage(tensors)
        save_file(tensors, cycle / "draft" / "model.safetensors", metadata={"format": "pt"})
        judged(name, cycle, cycle / "draft")
    table = Table("poison", "the gate")
    for name, verdict in verdicts.items():
        table.add_row(name, verdict["words"])
    Console(width=120).print(table)
    sys.exit(any(verdict["passed"] for verdict in verdicts.values()))


if __name__ == "__main__":
    typer.run(main)
