"""What a study compares, as one checked configuration."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, field_validator, model_validator

from afaspec.config import TargetAdapter
from afaspec.train.config import TrainSettings
from bench.records.settings import (
    ChatDate,
    EvalFraction,
    ModelName,
    RowFields,
    Settings,
    SkipBadRows,
    TemplateKwargs,
)
from drafts.errors import UserError

T = TypeVar("T")
NAME = re.compile(r"[A-Za-z0-9][\w.+-]*")
GENERAL = "general"  # as a domain is called, but none that an arm is trained for
RESERVED = (
    GENERAL,
    "base",
    "none",
    "ngram",
)  # arms that every study or every benchmark has by itself
# The whole study decides on these; an arm that set one would not be compared like with like.
OF_THE_STUDY = ("seed", "steps", "eval_fraction", "validation_limit", "tensorboard")
DEFAULT_RATES: dict[str, list[float]] = {
    "lora": [1e-3, 3e-3, 1e-2],
    "afa-lora": [1e-3, 3e-3, 1e-2],
    "full": [2e-4, 5e-4, 1e-3],
}


def _distinct(values: list[T]) -> list[T]:
    if len(set(values)) < len(values):
        raise ValueError("expected distinct values")
    return values


def _positive(values: list[int | None]) -> list[int | None]:
    if any(value is not None and value < 1 for value in values):
        raise ValueError("expected 1 or more")
    return values


Axis = Annotated[  # a single value may stand for a list
    list[T],
    BeforeValidator(lambda value: value if isinstance(value, list) else [value]),
    AfterValidator(_distinct),
    Field(min_length=1),
]
Counts = Annotated[Axis[T], AfterValidator(_positive)]


class DomainConfig(Settings):
    """One kind of traffic: where its prompts come from, and how the target answers them.

    Answers are greedy: offline acceptance is a walk along the target's greedy path.
    """

    prompts: str = Field(description="JSONL file, folder of source files, or dataset id")
    train_limit: int | None = Field(320, gt=1, description="prompts to train and validate on")
    eval_limit: int | None = Field(60, gt=0, description="prompts to measure on")
    eval_fraction: EvalFraction = 0.1
    field: RowFields = None
    skip_bad_rows: SkipBadRows = False
    suffixes: list[str] | None = Field(None, description="endings of the files to read")
    prompt_tokens: int = Field(128, gt=0, description="prompt length in plain texts and files")
    max_prompt_tokens: int | None = Field(None, gt=0, description="longest prompt allowed")
    truncate_prompts: bool = Field(False, description="keep the last tokens of longer prompts")
    chat: Literal["auto", "always", "never"] = Field("auto", description="chat template")
    chat_template_kwargs: TemplateKwargs = Field(default_factory=dict)
    chat_date: ChatDate = None
    max_new_tokens: int = Field(128, gt=0, description="longest answer")
    seed: int = Field(0, description="of the prompts drawn")


class ArmConfig(TrainSettings):
    """One arm: how it trains, where that differs from `train`, and the rates that it tries."""

    learning_rates: list[float] | None = Field(
        None, min_length=1, description="peak rates tried; a single one is taken as it is"
    )

    against: list[str] | None = Field(
        None,
        description="arms that it is compared with [default: all]; fewer comparisons find more",
    )

    mix: float | None = Field(
        None, gt=0, lt=1, description="share of the sequences that are replayed from `general`"
    )

    @field_validator("learning_rates")
    @classmethod
    def _rising(cls, rates: list[float] | None) -> list[float] | None:
        if rates and (min(rates) <= 0 or len(set(rates)) < len(rates)):
            raise ValueError("expected distinct rates above 0")
        return sorted(rates) if rates else None

    @model_validator(mode="after")
    def _its_own_only(self) -> ArmConfig:
        if wrong := sorted(self.model_fields_set.intersection(OF_THE_STUDY)):
            raise ValueError(f"{wrong[0]} is set for the whole study, not by arm")
        if {"learning_rate", "learning_rates"} <= self.model_fields_set:
            raise ValueError("give learning_rate or learning_rates, not both")
        return self

    def grid(self) -> list[float]:
        """The rates to begin with, rising."""
        if self.learning_rate is not None:
            return [self.learning_rate]
        return self.learning_rates or DEFAULT_RATES[self.arm]


class CommonSettings(TrainSettings):
    """Training settings of all arms."""

    @model_validator(mode="after")
    def _common_only(self) -> CommonSettings:
        not_common = {*OF_THE_STUDY, "arm", "rank", "learning_rate"}
        if wrong := sorted(self.model_fields_set & not_common):
            raise ValueError(f"{wrong[0]} does not belong into train: see afaspec compare --help")
        return self


class TuningConfig(Settings):
    """How learning rates are chosen; see `afaspec.compare.plan`."""

    steps: int | None = Field(None, gt=0, description="steps of each try [default: the budget]")
    seed: int = Field(0, description="seed of the tries")
    validation: float = Field(
        0.2, gt=0, lt=1, description="share of the train split held out, by content"
    )
    validation_limit: int = Field(64, gt=0, description="of them, sequences looked at")
    tie: float = Field(0.005, ge=0, lt=1, description="share of the best that counts as a tie")
    extensions: int = Field(2, ge=0, description="rates added beyond the grid at most")


class VllmConfig(Settings):
    """How merged drafts are measured in vLLM, with `measure: vllm`."""

    arms: list[str] | None = Field(None, description="labels of the variants [default: all]")
    seeds: list[int] | None = Field(None, description="seeds measured [default: the first]")
    prompts: int | None = Field(None, gt=0, description="eval prompts [default: all]")
    rounds: int = Field(2, gt=0, description="how often every prompt is run")
    max_tokens: int = Field(128, gt=0, description="tokens to write per prompt")
    concurrency: int = Field(1, gt=0, description="requests at once")
    enforce_eager: bool = Field(False, description="do not compile")
    cache_gib: float = Field(1.0, gt=0, description="KV cache per engine, in GiB")


class CompareConfig(Settings):
    """A study. Lists in `ranks`, `steps`, `samples` and `seeds` are axes: all are combined."""

    target: ModelName = Field(description="target model: a folder, a hub id, smollm2 or embedded")
    target_adapter: TargetAdapter = None
    draft: ModelName = Field(
        description="base draft: a folder, a hub id, smollm2-draft or embedded-draft"
    )
    out: Path = Field(Path("runs/compare"), description="folder of all results")
    k: int = Field(3, gt=0, le=16, description="speculative tokens per step")
    domains: dict[str, DomainConfig] = Field(min_length=1)
    general: DomainConfig | None = Field(
        None, description="prompts that every trained draft is measured on beside its domain's"
    )
    arms: dict[str, ArmConfig] = Field(min_length=1)
    train: CommonSettings = CommonSettings()
    ranks: Counts[int] = Field([8])
    steps: Counts[int] = Field([200])
    samples: Counts[int | None] = Field([None])
    seeds: Axis[int] = Field([0, 1, 2])
    tuning: TuningConfig = TuningConfig()
    measure: Literal["offline", "vllm"] = "offline"
    vllm: VllmConfig = VllmConfig()
    keep: Literal["adapters", "all", "none"] = "adapters"

    @field_validator("domains", "arms")
    @classmethod
    def _usable_names(cls, named: dict[str, Any]) -> dict[str, Any]:
        for name in named:
            if not NAME.fullmatch(name) or name in RESERVED:
                raise ValueError(f"{name!r} cannot be a name here (letters, digits, - and _)")
        return named

    @model_validator(mode="after")
    def _against_other_arms(self) -> CompareConfig:
        for name, arm in self.arms.items():
            if unknown := sorted(set(arm.against or []) - (self.arms.keys() - {name})):
                raise ValueError(f"the arm {name} is against {unknown[0]!r}, which is no other arm")
        return self

    @model_validator(mode="after")
    def _general_beside(self) -> CompareConfig:
        mixed = [name for name, arm in self.arms.items() if arm.mix is not None]
        if self.general is None:
            if mixed:
                raise ValueError(f"the arm {mixed[0]} has mix, but the study has no general")
            return self
        for name, domain in self.domains.items():  # else one's eval side is another's train side
            if domain.eval_fraction != self.general.eval_fraction:
                raise ValueError(
                    f"eval_fraction is {self.general.eval_fraction} in general and "
                    f"{domain.eval_fraction} in {name}: give both the same"
                )
        return self

    @property
    def sets(self) -> dict[str, DomainConfig]:
        """All prompts by name: the domains', and the general ones last."""
        return self.domains | ({GENERAL: self.general} if self.general else {})


def part(config: CompareConfig, names: Sequence[str]) -> CompareConfig:
    """The study with these arms and domains alone; with none of a kind named, all of that kind.

    Raises `UserError` for a name that is neither.
    """
    if unknown := [name for name in names if name not in config.arms.keys() | config.domains]:
        known = ", ".join([*config.arms, *config.domains])
        raise UserError(f"{unknown[0]!r} is no arm and no domain", hint=f"choose from {known}")
    arms = [name for name in config.arms if name in names] or list(config.arms)
    domains = [name for name in config.domains if name in names] or list(config.domains)
    kept = {}
    for name in arms:
        against = config.arms[name].against
        present = against and [other for other in against if other in arms]
        kept[name] = config.arms[name].model_copy(update={"against": present})
    chosen = {name: config.domains[name] for name in domains}
    return config.model_copy(update={"arms": kept, "domains": chosen})


def quick(config: CompareConfig) -> CompareConfig:
    """A small version of the study, in a folder of its own: does it run, and how long is a step?"""
    small = {
        name: domain.model_copy(
            update={
                "train_limit": min(domain.train_limit or 64, 64),
                "eval_limit": min(domain.eval_limit or 16, 16),
            }
        )
        for name, domain in config.sets.items()
    }
    general = small.pop(GENERAL, None)
    return config.model_copy(
        update={
            "out": config.out.with_name(f"{config.out.name}-quick"),
            "domains": small,
            "general": general,
            "ranks": config.ranks[:1],
            "steps": [min(*config.steps, 40)],
            "samples": [None],
            "seeds": config.seeds[:2],
            "tuning": config.tuning.model_copy(update={"extensions": 0}),
        }
    )
