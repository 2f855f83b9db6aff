"""What the embedded pair is and how long it trains."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from pydantic import Field

from afaspec.embedded.unpack import ASSETS
from bench.records.settings import Settings


class TargetShape(Settings):
    """How large the target is."""

    GROUP: ClassVar[str] = "Target: shape"

    vocab_size: int = Field(8192, description="tokens of its tokenizer")
    hidden_size: int = Field(512, description="width")
    intermediate_size: int = Field(1408, description="width inside its MLPs")
    num_hidden_layers: int = Field(12, description="layers")
    num_attention_heads: int = Field(8, description="heads of queries")
    num_key_value_heads: int = Field(4, description="heads of keys and values")
    max_position_embeddings: int = Field(1024, description="longest sequence")


class PretrainConfig(TargetShape):
    """What the target is and how long it trains."""

    GROUP: ClassVar[str] = "Target: training"

    minutes: float | None = Field(70.0, description="time for it")
    tokens: int | None = Field(None, description="a budget in tokens, in place of minutes")
    tokens_per_step: int = Field(4096, description="tokens of an optimizer step")
    sequence_length: int = Field(512, description="tokens of a sequence")
    long_fraction: float = Field(0.2, description="last part, on the longest sequences")
    rounded_fraction: float = Field(0.3, description="last part, on weights rounded to int4")
    warmup_steps: int = Field(30, description="steps of warm-up")
    decay_fraction: float = Field(0.5, description="last part, in which the rate falls to 5%")
    muon_lr: float = Field(0.02, description="peak rate of the matrices")
    adamw_lr: float = Field(4e-3, description="peak rate of the rest")
    weight_decay: float = Field(0.05, description="of both optimizers")
    compiled: bool = Field(True, description="compile the model")
    save_minutes: float = Field(5.0, description="time between checkpoints")
    seed: int = Field(0, description="of the weights and the order of the data")


class BuildPlace(Settings):
    """What `afaspec build-embedded` reads and writes."""

    GROUP: ClassVar[str] = "Data"

    work: Path = Field(Path("runs/embedded"), description="folder for all stages' results")
    out: Path = Field(ASSETS, description="folder for the packed pair (default: the package's own)")
    extra: Path | None = Field(
        None, description="folder with further training texts, for the target"
    )
    characters: int = Field(12_000_000, gt=0, description="training text per domain at most")
    seed: int = Field(0, description="of the texts drawn, and of the draft")


class DraftTraining(Settings):
    """How the draft is made."""

    GROUP: ClassVar[str] = "Draft"

    draft_vocab_size: int = Field(6144, gt=0, description="its reduced vocabulary")
    draft_prompts: int = Field(1200, gt=0, description="Python prompts the target completes")
    draft_new_tokens: int = Field(128, gt=0, description="tokens of each completion")
    draft_steps: int = Field(320, gt=0, description="optimizer steps")
    draft_learning_rate: float = Field(1e-3, gt=0, description="peak rate")


class BuildConfig(DraftTraining, BuildPlace):
    """What `afaspec build-embedded` makes, and how much time it takes for it."""

    target: PretrainConfig = PretrainConfig()
