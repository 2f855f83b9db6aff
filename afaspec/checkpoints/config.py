"""What a draft from scratch is made of."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from bench.records.settings import Listed, ModelName, Settings
from drafts.tensors import Float

Start = Literal["target", "random"]


class InitConfig(Settings):
    """What `afaspec init` takes. None means the family's usual, or the target's own."""

    GROUP: ClassVar[str] = "Draft"

    family: str = Field(
        description="eagle3, eagle, medusa, peagle, dflash, dspark, mtp, pard or draft_model"
    )
    target: ModelName = Field(description="the target's folder or hub id, `smollm2` or `embedded`")
    out: Path = Field(description="new folder for the draft")
    layers: int | None = Field(None, ge=1, description="decoder layers (Medusa: per head)")
    intermediate_size: int | None = Field(
        None, ge=1, description="width of the layers' MLP (default: the target's dense one)"
    )
    layer_ids: Listed | None = Field(
        None, description="the target's hidden states to read, such as 2,6,9"
    )
    vocab: int | None = Field(
        None, description="keep this many tokens, the most frequent in the stores' responses"
    )
    store: list[Path] | None = Field(
        None, description="feature store to count tokens in and take layers from (repeat it)"
    )
    heads: int | None = Field(
        None, ge=1, description="tokens that a Medusa or DFlash draft is made for"
    )
    start: Start | None = Field(
        None,
        description="what the layers begin as: copies of the target's last (EAGLE-3, P-EAGLE), or "
        "random [default: target, where that can be had]",
    )
    dtype: Float | None = Field(None, description="of the weights (default: the target's)")
    seed: int = Field(0, description="of the random weights")
