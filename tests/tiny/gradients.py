"""The gradient of one optimizer step of a training run, in one process or in several.

torchrun --nproc-per-node 2 -m tests.tiny.gradients STORE DRAFT OUT BATCH_SIZE ACCUMULATION [MIX]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from afaspec.cli.adapt.train import open_inputs
from afaspec.train.arm import set_up
from afaspec.train.config import TrainConfig
from afaspec.train.loader import Batches, split_sequences
from afaspec.train.mix import parts_of
from afaspec.train.step import join_processes, sum_gradients


def step_gradient(config: TrainConfig, step: int = 1) -> dict[str, Tensor]:
    """Of each trained parameter, at weights where no adapter is zero."""
    batches = batches_of(config)
    draft = batches.objective.draft
    generator = torch.Generator().manual_seed(5)
    trained = [parameter for parameter in draft.parameters() if parameter.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    for loss in batches.losses(step):
        loss().backward()
    if batches.accelerator.num_processes > 1:
        sum_gradients(batches.accelerator, trained)
    return {name: p.grad for name, p in draft.named_parameters() if p.grad is not None}


def batches_of(config: TrainConfig) -> Batches:
    """The batches of a run that trains on the whole store, or on its part where others are mixed
    in."""
    accelerator = join_processes()
    store, draft, target = open_inputs(config)
    setup = set_up(config, draft, target, accelerator.device)
    split = (list(range(len(store))), []) if not config.mix else split_sequences(store, config)
    parts = parts_of(config, store, split, draft, target)
    return Batches(config, parts, setup.objective, accelerator)


def run_settings(
    store: Path, draft: Path, out: Path, batch_size: int, accumulation: int, *mix: str
) -> TrainConfig:
    return TrainConfig(
        store=store, draft=draft, out=out, batch_size=batch_size, accumulation=accumulation,
        arm="afa-lora", rank=4, init="default", precision="fp32", compiled=False,
        mix=list(mix) or None,
    )  # fmt: skip


if __name__ == "__main__":
    store, draft, out = map(Path, sys.argv[1:4])
    sizes = int(sys.argv[4]), int(sys.argv[5])
    found = step_gradient(run_settings(store, draft, out, *sizes, *sys.argv[6:]))
    if torch.distributed.get_rank() == 0:
        save_file(found, out)
    torch.distributed.destroy_process_group()
