"""The reader of a capture, or of a training that keeps no states."""

from __future__ import annotations

from typing import Any

from afaspec.capture.readers.protocol import Reader
from afaspec.capture.readers.transformers_model import TransformersReader
from afaspec.capture.readers.vllm_engine import VllmReader
from afaspec.capture.states import ReadWith, ToRead


def open_reader(read_with: ReadWith, what: ToRead, model: Any = None) -> Reader:
    """`model` is the target where transformers has it loaded."""
    return VllmReader(what) if read_with == "vllm" else TransformersReader(what, model)
