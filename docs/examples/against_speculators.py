"""What a training step of an EAGLE-3 draft costs here and in speculators, side by side.

    pip install --no-deps speculators==0.9.0
    python docs/examples/against_speculators.py
    python docs/examples/against_speculators.py --lengths 2048,8192 --vocabularies 32000,128256 \
        --draft-steps 3,7 --size llama-8b --arms full,lora --precision bf16

Loss and gradients of the same number of response tokens, the same draft steps and the same trained
weights (all but embedding and output layers), in fresh processes in turn; on the GPU where there is
one. speculators trains no adapters: `lora` is measured for afaspec alone.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn

from bench.kernels.cost import Cost, comparison, measured
from drafts.files import write_json

PROMPT = 0.1  # of each sequence


@dataclass(frozen=True)
class Sizes:
    """A target's widths, of which the draft is a layer, and its vocabulary."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int


SIZES = {
    "smollm2": Sizes(576, 1536, 9, 3, 64, 49152),
    "llama-8b": Sizes(4096, 14336, 32, 8, 128, 128256),
    "tiny": Sizes(64, 128, 4, 2, 16, 512),
}


@dataclass(frozen=True)
class Shape:
    """`batch` sequences of `length` tokens, of which the first `PROMPT` are not answered."""

    sizes: Sizes
    vocabulary: int
    batch: int
    length: int
    draft_steps: int
    arm: str
    bf16: bool
    attention: str

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.bf16 else torch.float32

    @property
    def tokens(self) -> int:
        return self.batch * self.length


def main(
    size: Annotated[str, typer.Option(help=f"Of the target: {', '.join(SIZES)}.")] = "smollm2",
    lengths: Annotated[str, typer.Option(help="Tokens of a sequence.")] = "256,1024,4096",
    vocabularies: Annotated[str, typer.Option(help="Of the draft.")] = "8192,49152",
    draft_steps: Annotated[str, typer.Option(help="Steps trained.")] = "3",
    arms: Annotated[str, typer.Option(help="full, lora.")] = "full",
    tokens: Annotated[int, typer.Option(help="Of a batch, at least one sequence.")] = 2048,
    precision: Annotated[str, typer.Option(help="fp32 or bf16, in autocast.")] = "fp32",
    attention: Annotated[
        str, typer.Option(help="speculators': eager, sdpa or simple_flex_attention.")
    ] = "sdpa",
    repeats: Annotated[int, typer.Option(help="Times that each is measured.")] = 2,
    threads: Annotated[int, typer.Option(help="Threads of torch.")] = 1,
    minutes: Annotated[float, typer.Option(help="No more begins after that.")] = 600.0,
    out: Annotated[Path | None, typer.Option(help="File for the figures, as JSON.")] = None,
) -> None:
    """Measure and print a table; the defaults are the sizes of a draft of SmolLM2-135M."""
    console, found, began = Console(), {}, time.monotonic()
    costs: dict[str, dict[str, Cost]] = {}
    cells = product(numbers(vocabularies), numbers(lengths), numbers(draft_steps), arms.split(","))
    for vocabulary, length, steps, arm in cells:
        batch, bf16 = max(1, tokens // length), precision == "bf16"
        shape = Shape(SIZES[size], vocabulary, batch, length, steps, arm, bf16, attention)
        small = replace(shape, batch=1, length=64)
        if time.monotonic() - began > 60 * minutes:
            console.print(f"left out: {arm}, vocabulary {vocabulary:,}, {length:,}, k = {steps}")
            continue
        words = f"{arm}, vocabulary {vocabulary:,}, {batch} x {length:,}, k = {steps}"
        ways = ["afaspec", "speculators"] if arm == "full" else ["afaspec"]
        costs[words] = {}
        console.print(words)
        for way in ways:
            try:
                costs[words][way] = measured(prepare, way, small, shape, repeats, threads)
            except torch.OutOfMemoryError:
                console.print(f"  {way}: more memory than there is")
            else:
                console.print(line(way, costs[words][way], shape))
        if len(costs[words]) == 2:
            found[words] = list(costs[words].values())
        if out is not None:
            measures = {
                name: {way: asdict(cost) for way, cost in pair.items()}
                for name, pair in costs.items()
            }
            write_json(out, {"shape": asdict(shape), "threads": threads, "costs": measures})
    console.print(comparison("step", found, "speculators"))


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def line(way: str, cost: Cost, shape: Shape) -> str:
    return f"  {way}: {shape.tokens / cost.seconds:,.0f} tokens/s, {cost.bytes / 2**20:,.0f} MiB"


def prepare(way: str, shape: Shape) -> Callable[[], object]:
    """Loss and gradients of one batch, ready to run."""
    gc.collect()
    loss = {"afaspec": afaspec_loss, "speculators": speculators_loss}[way](shape)

    def step() -> None:
        with torch.autocast(shape.device.type, torch.bfloat16, enabled=shape.bf16):
            value = loss()
        value.backward()

    return step


def filled(module: nn.Module, shape: Shape) -> nn.Module:
    """On its device, with small random weights."""
    module.to(shape.device)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.02)
    return module


def inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ids [n], mask [n], hidden [n, 3d] and final [n, d]."""
    n, device = shape.tokens, shape.device
    ids = torch.randint(shape.vocabulary, (n,), device=device)
    place = torch.arange(n, device=device) % shape.length
    hidden, final = (
        torch.randn(n, width * shape.sizes.hidden, device=device).to(shape.dtype)
        for width in (3, 1)
    )
    return ids, place >= PROMPT * shape.length, hidden, final


def afaspec_loss(shape: Shape) -> Callable[[], Tensor]:
    from afaspec.train.arm import prepare_arm
    from afaspec.train.config import TrainConfig
    from afaspec.train.objective import Batch, DraftObjective
    from drafts.families.eagle3.module import Eagle3Config, Eagle3Draft
    from drafts.target.head import TargetHead

    s = shape.sizes
    draft = Eagle3Draft(
        Eagle3Config(
            hidden_size=s.hidden,
            intermediate_size=s.intermediate,
            num_attention_heads=s.heads,
            num_key_value_heads=s.kv_heads,
            head_dim=s.head_dim,
            max_positions=131072,
            target_hidden_size=s.hidden,
            vocab_size=s.vocabulary,
            draft_vocab_size=shape.vocabulary,
            layer_ids=(1, 2, 3),
        )
    )
    filled(draft, shape)
    config = TrainConfig(store="none", draft="none", out="none", arm=shape.arm)
    prepare_arm(draft, config, Path("none"))
    weight = torch.randn(s.vocabulary, s.hidden, dtype=shape.dtype) / 50
    head = TargetHead(weight, None, scale=1.0, cap=None)
    objective = DraftObjective(
        draft,
        head,
        loss="kl",
        draft_steps=shape.draft_steps,
        step_decay=1.0,
        chunk=None,
        compiled=True,
    ).to(shape.device)
    batch = Batch(*inputs(shape), lengths=[shape.length] * shape.batch)
    return lambda: objective(batch)


def speculators_loss(shape: Shape) -> Callable[[], Tensor]:
    from speculators.config import SpeculatorsConfig, VerifierConfig
    from speculators.losses import resolve_loss_config
    from speculators.models.eagle3 import Eagle3SpeculatorConfig
    from speculators.models.eagle3.core import Eagle3DraftModel
    from speculators.proposals.greedy import GreedyTokenProposalConfig
    from transformers import LlamaConfig

    s = shape.sizes
    layer = LlamaConfig(
        hidden_size=s.hidden,
        intermediate_size=s.intermediate,
        num_attention_heads=s.heads,
        num_key_value_heads=s.kv_heads,
        head_dim=s.head_dim,
        vocab_size=s.vocabulary,
        num_hidden_layers=1,
        max_position_embeddings=131072,
    )
    layer._attn_implementation = shape.attention
    model: Any = Eagle3DraftModel(
        Eagle3SpeculatorConfig(
            transformer_layer_config=layer,
            draft_vocab_size=shape.vocabulary,
            speculators_config=SpeculatorsConfig(
                algorithm="eagle3",
                proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=shape.draft_steps)],
                default_proposal_method="greedy",
                verifier=VerifierConfig(name_or_path=None, architectures=[]),
            ),
        )
    )
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    filled(model, shape)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    ids, mask, hidden, final = inputs(shape)
    documents = torch.arange(shape.batch, device=shape.device).repeat_interleave(shape.length)
    implementation = "fused" if shape.device.type == "cuda" else "eager"
    given = {
        "hidden_states": hidden.to(torch.bfloat16 if shape.bf16 else torch.float32)[None],
        "input_ids": ids[None],
        "document_ids": documents[None],
        "loss_mask": mask[None].to(torch.float32),
        "position_ids": (torch.arange(shape.tokens, device=shape.device) % shape.length)[None],
        "verifier_last_hidden_states": final[None],
        "ttt_steps": shape.draft_steps,
        "loss_config": resolve_loss_config("kl_div", implementation),
    }

    def loss() -> Tensor:
        value: Tensor = model(**given)[1]
        return value

    return loss


if __name__ == "__main__":
    typer.run(main)
