"""A command in several processes, as `torchrun` starts it: one of them speaks for all."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from drafts.errors import UserError

IN_SEVERAL = ("train",)  # the commands that divide their work
PATIENCE = 20.0  # seconds within which torchrun ends the others when one has failed


def count() -> int:
    """How many processes there are of this command."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def rank() -> int:
    """This one's number among them."""
    return int(os.environ.get("RANK") or 0) if count() > 1 else 0


def check_command(name: str | None) -> None:
    """Raise `UserError` where several processes would each do the whole of a command."""
    if count() > 1 and name is not None and name not in IN_SEVERAL:
        raise UserError(
            f"afaspec {name} runs in one process, but torchrun started {count()}",
            hint=f"start it without torchrun (WORLD_SIZE is {count()})",
        )


@contextmanager
def one_message(told_by_all: tuple[type[Exception], ...]) -> Iterator[None]:
    """Let one process tell of an error.

    Mistakes of the kinds `told_by_all` are found by every process as a rule: the first tells them,
    and torchrun ends the others, which wait for that. So do those that merely lost another. A
    process that is not ended tells its own error after all.
    """
    try:
        yield
    except Exception as error:
        if count() > 1 and not (rank() == 0 and isinstance(error, told_by_all)):
            time.sleep(PATIENCE)
        raise
