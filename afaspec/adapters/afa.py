"""AFA as a LoRA variant on PEFT's own linear layer, and what a finished adapter leaves on disk.

    h = W0 x + s B phi(A x),    phi(z) = beta sigma(z) + (1 - beta) z

PEFT does the plumbing: targets, rank patterns, scaling, initialisation, saving. Plain LoRA is the
same call with `sigma=None`, which leaves PEFT's layer alone. At beta = 0 both are one thing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from afaspec.adapters.annealing import ACTIVATIONS, annealed_layers, annealed_linear
from afaspec.adapters.schedule import AnnealingSchedule
from drafts.errors import UserError
from drafts.files import read_json, write_json

RECORD = "annealing.json"


def adapt(model: nn.Module, config: LoraConfig, sigma: str | None) -> PeftModel:
    """Wrap `model` with LoRA by `config`; with an activation `sigma`, it is annealed.

    Raises `UserError` for an unknown activation, and for another LoRA variant such as DoRA.
    """
    if sigma is not None:
        if sigma not in ACTIVATIONS:
            raise UserError(
                f"activation {sigma!r} is unknown",
                hint=f"choose one of {', '.join(ACTIVATIONS)}",
            )
        config._register_custom_module(dict.fromkeys((nn.Linear, Conv1D), annealed_linear(sigma)))
    return get_peft_model(model, config)


@dataclass(frozen=True)
class AnnealingRecord:
    """What a saved adapter says of its annealing. Plain LoRA has activation None and beta 0."""

    activation: str | None
    beta: float
    step: int
    total_steps: int
    schedule: dict[str, Any] | None


def save_adapter(
    model: PeftModel,
    folder: Path,
    schedule: AnnealingSchedule | None,
    step: int,
    total: int,
) -> None:
    """Save as a stock PEFT LoRA, plus `annealing.json`, into the existing `folder`."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's hub card has nothing to say here
    write_record(model, folder, schedule, step, total)


def write_record(
    model: nn.Module, folder: Path, schedule: AnnealingSchedule | None, step: int, total: int
) -> None:
    """Write `annealing.json` beside an adapter that was saved in `folder`."""
    layers = annealed_layers(model)
    record = AnnealingRecord(
        activation=layers[0].name if layers else None,
        beta=max((layer.beta for layer in layers), default=0.0),
        step=step,
        total_steps=total,
        schedule=schedule.model_dump() if layers and schedule else None,
    )
    write_json(folder / RECORD, asdict(record))


def read_record(folder: Path) -> AnnealingRecord:
    """The adapter's annealing record. A stock PEFT adapter without one counts as plain LoRA."""
    path = folder / RECORD
    if not path.exists():
        return AnnealingRecord(None, 0.0, 0, 0, None)
    raw = read_json(path)
    try:
        record = AnnealingRecord(**raw)
        if not isinstance(record.beta, int | float) or not 0 <= record.beta <= 1:  # nor NaN
            raise TypeError
    except TypeError:
        raise UserError("is not an annealing record", where=path, hint="train again") from None
    return record
