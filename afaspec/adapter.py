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
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from afaspec.activations import ACTIVATION_NAMES, ACTIVATIONS
from afaspec.annealing import AnnealingSchedule
from drafts.errors import UserError
from drafts.files import read_json, write_json

RECORD = "annealing.json"


class AnnealedLora(LoraVariant):
    """One layer's annealed activation. `beta` is set from outside, by an `Annealer`."""

    def __init__(self, name: str):
        self.name, self.phi, self.beta = name, ACTIVATIONS[name], 1.0

    def init(self, module: LoraLinear, adapter_name: str, **_: Any) -> None:
        """Nothing beyond what PEFT's plain LoRA has set up."""

    def forward(
        self, module: LoraLinear, active_adapter: str, x: Tensor, result: Tensor, **_: Any
    ) -> Tensor:
        """The layer's whole output [..., out] for input x [..., in]."""
        z = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        if self.beta > 0:
            z = z.lerp(self.phi(z), self.beta)
        return result + module.lora_B[active_adapter](z) * module.scaling[active_adapter]

    def merge_safe(self, module: LoraLinear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        refuse_non_linear(self.beta)
        return orig_weight + module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def merge_unsafe(self, module: LoraLinear, active_adapter: str, orig_weight: Tensor) -> None:
        refuse_non_linear(self.beta)
        orig_weight.data += module.get_delta_weight(active_adapter).to(orig_weight.dtype)

    def unmerge(self, module: LoraLinear, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return orig_weight - module.get_delta_weight(active_adapter).to(orig_weight.dtype)


def adapt(model: nn.Module, config: LoraConfig, sigma: str | None) -> PeftModel:
    """Wrap `model` with LoRA by `config`; with an activation `sigma`, it is annealed.

    Raises `UserError` for an unknown activation, and for another LoRA variant such as DoRA.
    """
    if sigma is not None:
        if sigma not in ACTIVATION_NAMES:
            raise UserError(
                f"activation {sigma!r} is unknown",
                mend=f"choose one of {', '.join(ACTIVATION_NAMES)}",
            )
        config._register_custom_module(dict.fromkeys((nn.Linear, Conv1D), _annealed_linear(sigma)))
    return get_peft_model(model, config)


def _annealed_linear(name: str) -> type[LoraLinear]:
    class AnnealedLinear(LoraLinear):
        def __init__(
            self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any
        ):
            transposed = isinstance(base_layer, Conv1D)  # GPT-2's linear layer
            config.fan_in_fan_out |= transposed
            super().__init__(
                base_layer,
                adapter_name,
                config=config,
                is_target_conv_1d_layer=transposed,
                **kwargs,
            )

        def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> LoraVariant:
            if (other := super().resolve_lora_variant(config=config, **kwargs)) is not None:
                raise UserError(
                    f"the adapter cannot be annealed: it is another variant of LoRA already "
                    f"({type(other).__name__})",
                    mend="leave that variant (DoRA, for one) out of its LoraConfig",
                )
            return AnnealedLora(name)

    return AnnealedLinear


def annealed_layers(model: nn.Module, adapter: str | None = None) -> list[AnnealedLora]:
    """Every annealed activation in `model`, or those of one `adapter`; empty for plain LoRA."""
    return [
        variant
        for module in model.modules()
        if isinstance(module, LoraLinear)
        for name, variant in module.lora_variant.items()
        if isinstance(variant, AnnealedLora) and adapter in (None, name)
    ]


def refuse_non_linear(beta: float, where: Path | None = None) -> None:
    """A merge with beta > 0 would not be the function that was trained."""
    if beta > 0:
        raise UserError(
            f"the adapter is still non-linear (beta = {beta:.4g}); only beta = 0 merges",
            where=where,
            mend="finish its training, or use a checkpoint from after the annealing's end",
        )


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
        if not isinstance(record.beta, int | float):
            raise TypeError
    except TypeError:
        raise UserError("is not an annealing record", where=path, mend="train again") from None
    return record
