"""Everything a capture depends on, as one checked configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from afaspec.capture.turns import TrainTurns
from afaspec.config import TargetAdapter
from afaspec.store.manifest import Features
from bench.records.settings import (
    Listed,
    ModelName,
    OptionalModelName,
    PromptSettings,
    Settings,
)
from drafts.checkpoint.layer_ids import parse_layer_ids
from drafts.tensors import Float

SELF_PROMPTS = "self_prompts.jsonl"  # in a store's folder: prompts that the target has written

# What a store must share with the settings of a run that goes on with it.
FIXED = (
    "use_responses",
    "train_turns",
    "max_new_tokens",
    "temperature",
    "seed",
    "limit",
    "split",
    "eval_fraction",
    "prompt_tokens",
    "max_prompt_tokens",
    "truncate_prompts",
    "chat",
    "suffixes",
    "shard_mib",
)


def is_address(writer: str) -> bool:
    """Is it a server's?"""
    return writer.startswith(("http://", "https://"))


class StorePlace(Settings):
    """Whose hidden states are kept, which of them, and where."""

    GROUP: ClassVar[str] = "Models"

    target: ModelName = Field(description="the target's folder or hub id, `smollm2` or `embedded`")
    target_adapter: TargetAdapter = None
    draft: OptionalModelName = Field(
        None, description="keep just the hidden states that this draft reads"
    )
    layer_ids: Listed | None = Field(
        None, description="hidden states to keep, such as 2,6,9, or none [default: 2, L/2, L-3]"
    )
    out: Path = Field(description="folder of the feature store")
    overwrite: bool = Field(False, description="replace a store of other settings")


class SelfPromptSettings(Settings):
    """Prompts that the target writes itself, in the place of given ones."""

    GROUP: ClassVar[str] = "Self-prompts"

    self_prompts: int | None = Field(
        None, gt=0, description="prompts that the target is to write itself, instead of PROMPTS"
    )
    self_prompt_temperature: float = Field(
        1.0, gt=0, le=10, description="at which it writes them; 1 is its own distribution"
    )
    self_prompt_tokens: int = Field(
        256, gt=0, description="longest of them; one that does not end is left out"
    )


class AnswerSettings(Settings):
    """How the target answers."""

    GROUP: ClassVar[str] = "Answers"

    use_responses: bool = Field(False, description="take the rows' responses; generate nothing")
    max_new_tokens: int = Field(256, gt=0, description="longest response")
    temperature: float = Field(0.0, ge=0, le=10, description="0 takes the likeliest token")
    seed: int = Field(0, description="of the prompts drawn and the responses sampled")
    train_turns: TrainTurns = Field(
        "all", description="of a conversation, the assistant's turns to train on"
    )


class ReaderSettings(Settings):
    """What gives the hidden states of finished texts."""

    GROUP: ClassVar[str] = "Hidden states"

    states_with: Literal["auto", "transformers", "vllm"] = Field(
        "auto",
        description="what gives the hidden states; vllm: the target as it is served "
        "[default: vllm for a quantized target on a GPU, else transformers]",
    )
    tensor_parallel: int = Field(1, gt=0, description="devices over which vLLM spreads the target")
    enforce_eager: bool = Field(False, description="vLLM does not compile: starts sooner, slower")


class MachineSettings(Settings):
    """How the target runs, and how its states are stored."""

    GROUP: ClassVar[str] = "Machine"

    batch_size: int | None = Field(None, gt=0, le=4096, description="default: fits the memory")
    dtype: Literal["auto", Float] = Field("auto", description="type that the target computes in")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where it runs")
    generate_with: str = Field(
        "auto",
        description="what writes prompts and responses: transformers, vllm, or the address of a "
        "vLLM server [default: vllm for --self-prompts where it is installed, else transformers]",
    )
    server_model: str | None = Field(
        None, description="its name for the target, where it serves several models"
    )
    requests: int = Field(64, gt=0, description="that run on that server at once")
    features: Features = Field(
        "bf16",
        description="how hidden states are kept: int8 takes half of the disk; none keeps texts "
        "alone, and training asks the target for their states",
    )
    max_disk: float | None = Field(
        None,
        gt=0,
        description="GiB that the store may take; a capture that could take more is refused",
    )
    shard_mib: float = Field(128, gt=0, description="size at which a shard is closed")

    @field_validator("generate_with")
    @classmethod
    def _known_writer(cls, name: str) -> str:
        if name not in ("auto", "transformers", "vllm") and not is_address(name):
            raise ValueError(
                "expected auto, transformers, vllm or an address such as http://127.0.0.1:8000; "
                f"found {name!r}"
            )
        return name


class WorkerSettings(Settings):
    """Who captures."""

    GROUP: ClassVar[str] = "Workers"

    workers: int = Field(
        1, gt=0, description="processes that capture at once, through Ray, each a part at a time"
    )
    ray: str | None = Field(
        None, description="address of the Ray cluster they run on [default: one of this machine's]"
    )
    part_prompts: int = Field(
        4096, gt=0, description="prompts of a part; the store depends on it where parts are made"
    )


class CaptureConfig(
    WorkerSettings,
    MachineSettings,
    ReaderSettings,
    AnswerSettings,
    SelfPromptSettings,
    PromptSettings,
    StorePlace,
):
    """A run of `afaspec capture`. The target writes greedily unless `temperature` is set."""

    GROUP: ClassVar[str] = "Prompts"

    prompts: str | None = Field(
        None, description="JSONL file, folder of source files, dataset id, or suite:NAME"
    )
    suffixes: list[str] | None = Field(
        None, description="endings of the files to read in a folder (repeat it) [default: source]"
    )
    chat: Literal["auto", "always", "never"] = Field(
        "auto",
        description="chat template: for conversations (auto), for plain prompts too (always)",
    )

    @model_validator(mode="after")
    def _one_target_at_a_time(self) -> CaptureConfig:
        if self.states_with == "vllm" and self.generate_with == "transformers":
            raise ValueError(
                "--states-with vllm wants --generate-with vllm or a server, not transformers"
            )
        return self

    @model_validator(mode="after")
    def _prompts_from_one_place(self) -> CaptureConfig:
        if (self.prompts is None) == (self.self_prompts is None):
            raise ValueError("give either PROMPTS or --self-prompts N")
        if self.self_prompts is None:
            return self
        if self.use_responses:
            raise ValueError("--self-prompts has no responses to use: no --use-responses")
        if self.chat == "never":
            raise ValueError("--self-prompts needs the chat template: no --chat never")
        return self

    @field_validator("layer_ids")
    @classmethod
    def _distinct_layers(cls, text: str | None) -> str | None:
        if text in (None, "none"):
            return text
        return ",".join(map(str, parse_layer_ids(text)))

    @field_validator("suffixes")
    @classmethod
    def _dotted(cls, suffixes: list[str] | None) -> list[str] | None:
        return [s if s.startswith(".") else f".{s}" for s in suffixes] if suffixes else None

    @property
    def source(self) -> str:
        """Where the prompts are read: as given, or what the target has written into the store."""
        return self.prompts if self.prompts is not None else str(self.out / SELF_PROMPTS)

    def chosen_layer_ids(self) -> tuple[int, ...] | None:
        if self.layer_ids is None:
            return None
        return () if self.layer_ids == "none" else parse_layer_ids(self.layer_ids)

    def self_prompt_settings(self) -> dict[str, Any] | None:
        """How many prompts the target writes, and how; None where they are given."""
        if self.self_prompts is None:
            return None
        return {
            "count": self.self_prompts,
            "temperature": self.self_prompt_temperature,
            "tokens": self.self_prompt_tokens,
        }

    def fixed_settings(self) -> dict[str, Any]:
        """The settings that decide what a store holds, as JSON values."""
        values = self.model_dump(mode="json")
        return {name: values[name] for name in FIXED}
