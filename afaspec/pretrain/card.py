"""The model card and the loss curves that stand beside the shipped files."""

from __future__ import annotations

import json
from operator import itemgetter
from pathlib import Path
from typing import Any

from afaspec.train.metrics import METRICS, read_rows
from afaspec.versions import versions
from drafts.files import atomic_file


def write_card(work: Path, out: Path, settings: dict[str, Any]) -> None:
    """Write README.md and loss.png to `out` from the build's logs in `work`."""
    target_rows = read_rows(work / "loss.jsonl")
    draft_rows = read_rows(work / "draft-run" / METRICS)
    with atomic_file(out / "loss.png") as temporary:
        plot_losses(target_rows, draft_rows, temporary)
    with atomic_file(out / "README.md") as temporary:
        temporary.write_text(card(target_rows, draft_rows, settings))


def card(target_rows: list[dict[str, Any]], draft_rows: list[dict[str, Any]], settings: Any) -> str:
    final = target_rows[-1]
    held_out = ", ".join(f"{name} {loss:.2f}" for name, loss in final["final_held_out"].items())
    evaluated = [row for row in draft_rows if "acceptance_length" in row]
    best = max(evaluated, key=itemgetter("acceptance_length"))
    target = settings["target"]
    return f"""# The embedded pair

**Target**: a Llama-architecture code model, {target["hidden_size"]} wide, \
{target["num_hidden_layers"]} layers, byte-level BPE of {target["vocab_size"]}. It exists so that
afaspec can be tried, tested and demonstrated with no network; it is no good at programming.

- Data: Python source of the standard library and installed packages, C++ headers of PyTorch, and at
  build time Markdown design documents, Python programs and grade-school maths problems.
- Trained on {final["tokens"]:,} tokens in {final["step"]:,} steps \
({final["minutes"]:.0f} minutes): Muon and AdamW, bf16 autocast,
  the last {target["rounded_fraction"]:.0%} on weights rounded to int4.
- Held-out loss, nats per token: {held_out}.
- Shipped as int4 groups of 64, each matrix in compressed-tensors' `pack-quantized` layout. The
  embedding is packed too, which transformers does not read: afaspec unpacks both models once, into
  its cache. The unpacked model *is* the model.

**Draft**: an EAGLE-3 head with a vocabulary of {settings["draft_vocab_size"]}, \
trained from scratch on {settings["draft_prompts"]} Python completions
of {settings["draft_new_tokens"]} tokens by the target, {settings["draft_steps"]} steps, \
shipped as int8 groups of 64. Best held-out offline
acceptance length on Python: {best["acceptance_length"]:.2f} (k = 3, before rounding to int8).

![loss curves](loss.png)

`afaspec build-embedded` rebuilds both. Versions: {json.dumps(versions())}.
"""


def plot_losses(
    target_rows: list[dict[str, Any]], draft_rows: list[dict[str, Any]], path: Path
) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    losses = [(row["tokens"] / 1e6, row["loss"]) for row in target_rows if "loss" in row]
    left.plot(*zip(*losses, strict=True), color="#0072B2", label="training")
    held = [r for r in target_rows if "held_out" in r]
    for name, colour in zip(held[-1]["held_out"] if held else [], _COLOURS, strict=False):
        points = [(r["tokens"] / 1e6, r["held_out"][name]) for r in held]
        left.plot(*zip(*points, strict=True), "o--", color=colour, label=f"held out: {name}")
    left.set(title="target", xlabel="tokens (millions)", ylabel="loss (nats per token)")
    left.legend(frameon=False, fontsize=8)
    steps = [(row["step"], row["loss"]) for row in draft_rows if "loss" in row]
    right.plot(*zip(*steps, strict=True), color="#0072B2")
    right.set(title="base draft", xlabel="step", ylabel="KL to the target (nats)")
    figure.savefig(path, dpi=110, format="png")
    plt.close(figure)


_COLOURS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00")
