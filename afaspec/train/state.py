"""A training run's resumable state: trainable weights, optimizer and counters."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drafts.files import atomic_folder, read_json, remove_leftovers, write_json


@dataclass
class Progress:
    """Where a run stands: finished optimizer steps, and the best held-out acceptance so far."""

    step: int = 0
    best_step: int = -1
    best_acceptance_length: float = 0.0
    seconds: float = 0.0
    annealing: dict[str, Any] = field(default_factory=dict)  # the annealer's state


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name."""
    return {
        n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad
    }


def save_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
) -> None:
    """Write the checkpoint `folder`, replacing the one before."""
    tensors = {"rng": torch.get_rng_state()}
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            tensors[f"{names[index]}|{key}"] = value.cpu().contiguous()
    with atomic_folder(folder) as temporary:
        save_file(trainable_state(model), temporary / "trainable.safetensors")
        save_file(tensors, temporary / "optimizer.safetensors")
        write_json(temporary / "progress.json", asdict(progress))


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> Progress | None:
    """Restore the checkpoint into model and optimizer; None without one."""
    remove_leftovers(folder)
    if not folder.exists():
        return None
    weights = load_file(folder / "trainable.safetensors")
    parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    tensors = load_file(folder / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("rng"))
    state: dict[int, dict[str, Any]] = {}
    index = {name: i for i, name in enumerate(parameters)}
    for joined, value in tensors.items():
        name, key = joined.split("|")
        state.setdefault(index[name], {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    return Progress(**read_json(folder / "progress.json"))
