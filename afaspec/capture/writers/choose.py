"""The writer of a capture."""

from __future__ import annotations

from collections.abc import Callable

from afaspec.capture.plan import Setup
from afaspec.capture.writers.protocol import Writer
from afaspec.capture.writers.server import ServerWriter
from afaspec.capture.writers.transformers_model import TransformersWriter
from afaspec.capture.writers.vllm_engine import VllmWriter

WRITERS: dict[str, Callable[[Setup], Writer]] = {
    "transformers": TransformersWriter,
    "vllm": VllmWriter,
    "server": ServerWriter,
}


def open_writer(setup: Setup) -> Writer:
    """The writer of this capture; it loads nothing before it has to write.

    Raises `UserError` for a server that does not answer.
    """
    return WRITERS[setup.write_with](setup)
