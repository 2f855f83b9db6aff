"""Everything a training run depends on, as one checked configuration."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from afaspec.adapters.schedule import Activation, AnnealingSchedule
from afaspec.capture.config import ReaderSettings
from afaspec.config import TargetAdapter
from bench.records.settings import EvalFraction, ModelName, OptionalModelName, Settings
from drafts.tensors import has_bf16

if TYPE_CHECKING:
    import torch

Arm = Literal["afa-lora", "lora", "full"]
Loss = Literal["kl", "reverse_kl", "jsd", "tv", "lk", "ce"]  # functions in `afaspec.train.losses`
AFA_ONLY = ("activation", "annealing")
OWN_INITS = ("gradient", "default")  # they leave the frozen weights as they are; others are PEFT's
PEFT_INITS = ("gaussian", "orthogonal", "olora", "pissa")  # those that need nothing but the weights
FAST_PISSA = re.compile(r"pissa_niter_\d+")
DEFAULT_LEARNING_RATES: dict[str, float] = {"afa-lora": 2.5e-3, "lora": 2.5e-3, "full": 5e-4}
# Where each sequence is seen more than so often; both as docs/study.md found them.
MANY_PASSES = 10
SMALL_DATA_RATES: dict[str, float] = {"afa-lora": 3e-4, "lora": 3e-4, "full": 1.25e-4}


class RunPlace(Settings):
    """Where a run reads and writes."""

    GROUP: ClassVar[str] = "Models"

    store: Path = Field(description="feature store that `afaspec capture` wrote")
    draft: ModelName = Field(
        description="base draft to adapt: a folder, a hub id, smollm2-draft or embedded-draft"
    )
    out: Path = Field(description="folder of the run")
    target: OptionalModelName = Field(None, description="target model (default: the store's)")
    target_adapter: TargetAdapter = None
    mix: list[str] | None = Field(
        None,
        description="replay another feature store: with STORE=0.2 a fifth of the sequences that a "
        "step sees are its own, and how good the draft stays on it is shown; STORE=0 only shows "
        "that (repeat it)",
    )

    @field_validator("mix")
    @classmethod
    def _stores_and_shares(cls, mix: list[str] | None) -> list[str] | None:
        shares = [share_of(text)[1] for text in mix or []]
        if sum(shares) >= 1:
            raise ValueError("the shares leave nothing to --store: expected a sum below 1")
        return mix

    @property
    def mixed(self) -> list[tuple[Path, Fraction]]:
        """The stores of `mix` with their shares."""
        return [share_of(text) for text in self.mix or []]


def share_of(text: str) -> tuple[Path, Fraction]:
    """The store and the share that `STORE=SHARE` names. Raises `ValueError` for anything else."""
    store, _, number = text.rpartition("=")
    try:
        share = Fraction(number)  # exact, so that a tenth is a tenth
    except (ValueError, ZeroDivisionError):
        share = Fraction(-1)
    if not store or not 0 <= share < 1:
        raise ValueError(
            f"expected STORE=SHARE, such as runs/general=0.2, with a share of 0 or more and below "
            f"1; found {text!r}"
        )
    return Path(store), share


class ArmSettings(Settings):
    """What is trained."""

    GROUP: ClassVar[str] = "Arm"

    arm: Arm = Field("lora", description="adapters (plain or annealed), or all weights")
    rank: int = Field(32, gt=0, description="LoRA rank")
    alpha: float | None = Field(None, gt=0, description="LoRA alpha (default: 2 * rank)")
    rslora: bool = Field(False, description="scale by alpha/sqrt(rank)")
    init: str = Field(
        "gradient",
        description="where adapters begin: gradient (A along the frozen weights' gradients), "
        f"default (A at random), or PEFT's {', '.join(PEFT_INITS)}, pissa_niter_N",
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="LoRA dropout")
    modules: list[str] | None = Field(
        None, min_length=1, description="linear layers that get adapters [default: all but lm_head]"
    )
    lm_head: bool = Field(False, description="adapt (or train) the output layer as well")
    activation: Activation = Field("relu", description="AFA's sigma")
    annealing: AnnealingSchedule = AnnealingSchedule()

    @field_validator("init")
    @classmethod
    def _known_init(cls, init: str) -> str:
        if init not in (*OWN_INITS, *PEFT_INITS) and not FAST_PISSA.fullmatch(init):
            known = ", ".join((*OWN_INITS, *PEFT_INITS))
            raise ValueError(f"choose {known} or pissa_niter_N with N iterations")
        return init

    @model_validator(mode="after")
    def _even_rank(self) -> ArmSettings:
        if self.init == "orthogonal" and self.rank % 2:
            raise ValueError(f"init orthogonal needs an even rank; the rank is {self.rank}")
        return self


class LossSettings(Settings):
    """What it is trained to do."""

    GROUP: ClassVar[str] = "Loss"

    loss: Loss = Field("kl", description="of the draft's distribution from the target's")
    draft_steps: int = Field(3, gt=0, le=16, description="draft steps trained (k at serving)")
    step_decay: float = Field(0.8, gt=0, le=1, description="weight of each later draft step")
    chunk: int | None = Field(
        None, gt=0, description="rows of logits held at once [default: by the vocabulary]"
    )
    compiled: bool = Field(True, description="compile the loss")


class OptimizerSettings(Settings):
    """How the weights move."""

    GROUP: ClassVar[str] = "Optimizer"

    steps: int = Field(300, gt=0, description="optimizer steps")
    batch_size: int = Field(8, gt=0, description="sequences per micro-batch")
    accumulation: int = Field(1, gt=0, description="micro-batches per optimizer step")
    learning_rate: float | None = Field(
        None, gt=0, description="peak rate (default: by arm, and lower where sequences are few)"
    )
    warmup: float = Field(0.05, ge=0, lt=1, description="warm-up, as a fraction of the steps")
    weight_decay: float = Field(0.0, ge=0, description="of AdamW")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    precision: Literal["auto", "bf16", "fp32"] = Field(
        "auto", description="autocast in bf16, or none; auto: bf16 where the processor has it"
    )
    seed: int = Field(0, description="of the adapters, the order of the data and the held-out part")


class MemorySettings(Settings):
    """What a step holds at once. Nothing here changes the gradient, roundings aside."""

    GROUP: ClassVar[str] = "Memory"

    batch_tokens: int | None = Field(
        None,
        gt=0,
        description="a micro-batch of more tokens goes through the draft in parts of whole "
        "sequences",
    )
    gradient_checkpointing: bool = Field(
        False, description="make each draft step's values again for its gradient: slower"
    )


class EvaluationSettings(Settings):
    """How a run is followed and kept."""

    GROUP: ClassVar[str] = "Evaluation and checkpoints"

    eval_fraction: EvalFraction = 0.1
    validation_limit: int = Field(
        64, gt=0, description="sequences held out of training and evaluated, at most"
    )
    eval_every: int = Field(50, gt=0, description="steps between evaluations")
    checkpoint_every: int = Field(50, gt=0, description="steps between resumable checkpoints")
    tensorboard: bool = Field(True, description="write TensorBoard event files")


class TrainSettings(
    EvaluationSettings, MemorySettings, OptimizerSettings, LossSettings, ArmSettings
):
    """How a draft is trained, wherever its data lies. Sizes are in sequences, tokens or steps."""

    def on(self, device: torch.device) -> Self:
        """These settings as they are on `device`: with a precision that it has."""
        if self.precision != "auto":
            return self
        return self.model_copy(update={"precision": "bf16" if has_bf16(device) else "fp32"})

    @property
    def bf16(self) -> bool:
        """Whether matrix products are done in bf16. To be asked of settings `on` a device."""
        assert self.precision != "auto"
        return self.precision == "bf16"

    def peak_learning_rate(self, sequences: int, share: float = 1.0) -> float:
        """The given rate, else the arm's default for so many training sequences.

        `share` is theirs of all that a step sees.
        """
        passes = share * self.steps * self.batch_size * self.accumulation / sequences
        by_arm = SMALL_DATA_RATES if passes > MANY_PASSES else DEFAULT_LEARNING_RATES
        return self.learning_rate or by_arm[self.arm]


class TrainConfig(TrainSettings, ReaderSettings, RunPlace):
    """A run of `afaspec train`. Paths are folders."""

    @model_validator(mode="after")
    def _annealed_or_not(self) -> TrainConfig:
        given = [name for name in AFA_ONLY if name in self.model_fields_set]
        if given and self.arm != "afa-lora":
            raise ValueError(f"{given[0]} is of the arm afa-lora; the arm is {self.arm}")
        return self
