"""Annealing: beta falls from 1 (non-linear) to exactly 0 (plain LoRA) while training runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.layer import LoraVariant
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from transformers.pytorch_utils import Conv1D

from afaspec.adapters.schedule import Activation, AnnealingSchedule
from drafts.errors import UserError


class Annealer:
    """Drives beta of an adapted model from its optimizer's steps, in any training loop.

        annealer = Annealer(annealed_layers(model), schedule, total_steps)
        annealer.attach(optimizer)

    Each `optimizer.step()` then sets beta. `state_dict` and `load_state_dict` make it resumable;
    with a larger `total_steps` in the state, beta waits where it was until the longer schedule has
    come down to it.
    """

    def __init__(self, layers: list[AnnealedLora], schedule: AnnealingSchedule, total_steps: int):
        self.layers, self.schedule, self.total_steps = layers, schedule, total_steps
        self.step, self.reached = 0, 1.0
        self._apply()

    @property
    def beta(self) -> float:
        """The largest of any layer."""
        return max((layer.beta for layer in self.layers), default=0.0)

    def attach(self, optimizer: Optimizer) -> None:
        """Advance after each `optimizer.step()`."""
        optimizer.register_step_post_hook(lambda *_: self.advance())

    def advance(self) -> None:
        self.step += 1
        self._apply()

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "total_steps": self.total_steps, "beta": self.reached}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.total_steps = state["step"], state["total_steps"]
        self.reached = state.get("beta", 1.0)
        self._apply()

    def _apply(self) -> None:
        self.reached = min(self.reached, self.schedule.beta(self.step, self.total_steps))
        for layer in self.layers:
            layer.beta = self.reached


def leaky_relu(z: Tensor) -> Tensor:
    return F.leaky_relu(z, 0.1)


# torch's functions of these names, but for the slope
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    name: leaky_relu if name == "leaky_relu" else getattr(F, name) for name in get_args(Activation)
}


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


def annealed_linear(name: str) -> type[LoraLinear]:
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
                    hint="leave that variant (DoRA, for one) out of its LoraConfig",
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
    if beta != 0:  # NaN is not 0 either
        raise UserError(
            f"the adapter is still non-linear (beta = {beta:.4g}); only beta = 0 merges",
            where=where,
            hint="finish its training, or use a checkpoint from after the annealing's end",
        )
