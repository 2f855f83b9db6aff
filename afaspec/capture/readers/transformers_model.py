"""Reading with transformers in this process."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from afaspec.capture.states import ToRead
from afaspec.capture.target_model import load_target

if TYPE_CHECKING:
    from afaspec.capture.features import States

FORWARD_TOKENS = 8192  # through the model at a time


class TransformersReader:
    """The model in this process; `model` where it is loaded already."""

    def __init__(self, what: ToRead, model: Any = None):
        self.what = what
        self.model = model or load_target(what.target.folder, what.dtype, what.device)

    def read(self, sequences: Sequence[Sequence[int]]) -> Iterator[States]:
        from afaspec.capture.features import features

        yield from features(self.model, sequences, self.what.layer_ids, FORWARD_TOKENS)

    def close(self) -> None:
        self.model = None
