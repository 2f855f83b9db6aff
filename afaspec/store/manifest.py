"""The manifest of a feature store: what made it, and which shards it has."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic asks for it before Python 3.12

from afaspec.store.int8 import groups
from drafts.errors import UserError
from drafts.files import read_json, write_json

FORMAT = "afaspec-features/1"
Features = Literal["bf16", "int8", "none"]
NAME = "manifest.json"
CAPTURE_AGAIN = "capture it again with --overwrite"
# Where prompts lay, where the target ran, and how large files are: not what was captured.
NOT_CONTENT = ("prompts", "device", "shard_mib")


class TargetRecord(TypedDict):
    """The target whose hidden states these are."""

    path: str
    sha256: str
    hidden_size: int
    vocab_size: int
    num_layers: int


@dataclass(frozen=True)
class ShardRecord:
    """One finished shard file."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    file: Annotated[str, Field(pattern=r"^[\w.-]+\.safetensors$")]  # in the store's folder
    sequences: int
    tokens: int
    bytes: int
    sha256: str
    response_tokens: int


@dataclass
class Manifest:
    """Everything about a store but its tensors. Counts are sums over the shards."""

    target: TargetRecord
    layer_ids: tuple[int, ...]
    dtype: str
    settings: dict[str, Any]
    features: Features = "bf16"  # how the hidden states are kept
    versions: dict[str, str] = field(default_factory=dict)
    shards: list[ShardRecord] = field(default_factory=list)
    complete: bool = False

    @property
    def sequences(self) -> int:
        return sum(shard.sequences for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def response_tokens(self) -> int:
        return sum(shard.response_tokens for shard in self.shards)

    @property
    def greedy(self) -> bool:
        """Are the responses what the target itself says at temperature 0, as a server walks it?"""
        given = self.settings.get("use_responses", False)
        return not given and self.settings.get("temperature", 0.0) == 0

    @property
    def content_sha256(self) -> str:
        """Of what was captured, from which target and prompts; the same wherever it lies."""
        settings = {k: v for k, v in self.settings.items() if k not in NOT_CONTENT}
        counts = (self.sequences, self.tokens, self.response_tokens)
        what = [self.target["sha256"], self.layer_ids, self.dtype, settings, counts]
        if self.features != "bf16":
            what.append(self.features)
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    @property
    def token_bytes(self) -> int:
        """Bytes that one token takes in a shard."""
        return token_bytes(self.target["hidden_size"], len(self.layer_ids), self.features)

    def write(self, folder: Path) -> None:
        counts = {
            "sequences": self.sequences,
            "tokens": self.tokens,
            "response_tokens": self.response_tokens,
        }
        write_json(folder / NAME, {"format": FORMAT, **asdict(self), **counts})


def token_bytes(hidden_size: int, layers: int, features: Features) -> int:
    """input id int32, mask uint8, `layers` + 1 hidden states in bf16, or in int8 with scales."""
    if features == "none":
        return 4 + 1
    states = [hidden_size * layers, hidden_size]
    if features == "bf16":
        return 4 + 1 + sum(2 * width for width in states)
    return 4 + 1 + sum(width + 2 * groups(width) for width in states)


def hash_prompt(ids: Sequence[int]) -> int:
    """Of the token ids that a sequence was not trained to write: 63 bits of their SHA-256."""
    digest = hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def read_manifest(folder: Path) -> Manifest:
    """Read and check a store's manifest. Raises `UserError` when it is missing or malformed."""
    path = folder / NAME
    if not path.is_file():
        raise UserError(
            "is not a feature store: it has no manifest.json",
            where=folder,
            hint="give the folder that afaspec capture wrote",
        )
    raw = read_json(path)
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        found = raw.get("format") if isinstance(raw, dict) else type(raw).__name__
        problem = f"has the format {found!r}, expected {FORMAT!r}"
        raise UserError(problem, where=path, hint=CAPTURE_AGAIN)
    try:
        known = {"features": "bf16", **raw}  # older stores do not say
        found = {part.name: known[part.name] for part in fields(Manifest)}
        return TypeAdapter(Manifest).validate_python(found)
    except (KeyError, ValidationError) as error:
        path_in = [error.args[0]] if isinstance(error, KeyError) else error.errors()[0]["loc"]
        wrong = ".".join(map(str, path_in))
        raise UserError(f"lacks or garbles {wrong!r}", where=path, hint=CAPTURE_AGAIN) from None
