"""A training run's resumable state: trainable weights, optimizer, counters and random states."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drafts.errors import UserError
from drafts.files import atomic_folder, read_json, remove_leftovers, write_json


@dataclass
class Progress:
    """Where a run stands: finished optimizer steps, and the best held-out length so far.

    `base_length` and `base_per_position` are the base draft's, measured before the first step;
    `peak` is the learning rate that the run began with. `watched` and `base_watched` are lengths on
    the stores of `mix`, in their order: at `best_step`, and the base draft's.
    """

    step: int = 0
    best_step: int = -1
    best_length: float = 0.0
    base_length: float = 0.0
    base_per_position: list[float] = field(default_factory=list)
    peak: float = 0.0
    seconds: float = 0.0
    watched: list[float] = field(default_factory=list)
    base_watched: list[float] = field(default_factory=list)
    annealing: dict[str, Any] = field(default_factory=dict)  # the annealer's state


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that train, by name."""
    return {
        n: p.detach().cpu().contiguous() for n, p in model.named_parameters() if p.requires_grad
    }


def random_states(accelerator: Accelerator) -> dict[str, Tensor]:
    """The states of torch's generators, uint8 [processes, bytes]. All processes call it at once."""
    states = {"cpu": torch.get_rng_state()}
    if accelerator.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(accelerator.device)
    gathered = {
        name: accelerator.gather(state.to(accelerator.device)[None])
        for name, state in states.items()
    }
    return {name: states.cpu() for name, states in gathered.items()}


def save_state(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Progress,
    random: dict[str, Tensor],
) -> None:
    """Write the checkpoint `folder`, replacing the one before."""
    tensors, names = {}, _names(model, optimizer)
    for index, values in optimizer.state_dict()["state"].items():
        for key, value in values.items():
            tensors[f"{names[index]}|{key}"] = value.cpu().contiguous()
    with atomic_folder(folder) as temporary:
        save_file(trainable_state(model), temporary / "trainable.safetensors")
        save_file(tensors, temporary / "optimizer.safetensors")
        save_file(random, temporary / "random.safetensors")
        write_json(temporary / "progress.json", asdict(progress))


def load_state(
    folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, accelerator: Accelerator
) -> Progress | None:
    """Restore the checkpoint into model, optimizer and generators; None without one.

    A process or a device that the run did not have before keeps its generator as it is.
    """
    remove_leftovers(folder)
    if not folder.exists():
        return None
    try:
        progress = Progress(**read_json(folder / "progress.json"))
        random = load_file(folder / "random.safetensors")
    except (TypeError, FileNotFoundError):
        raise UserError(
            "was written by another version of afaspec",
            where=folder,
            hint="train anew in another --out, or go on with that version",
        ) from None
    weights = load_file(folder / "trainable.safetensors")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(weights[name])
    state: dict[int, dict[str, Any]] = {}
    index = {name: i for i, name in enumerate(_names(model, optimizer))}
    for joined, value in load_file(folder / "optimizer.safetensors").items():
        name, key = joined.split("|")
        state.setdefault(index[name], {})[key] = value
    optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
    own = accelerator.process_index
    if own < len(random["cpu"]):
        torch.set_rng_state(random["cpu"][own])
        if accelerator.device.type == "cuda" and "cuda" in random:
            torch.cuda.set_rng_state(random["cuda"][own], accelerator.device)
    return progress


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """The names of the optimizer's parameters, in the order of its state."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
