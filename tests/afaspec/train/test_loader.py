"""What is read ahead is what would be read when it is needed."""

from __future__ import annotations

import threading
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from afaspec.train.loader import AHEAD, Batches, Drawn, ReadAhead
from afaspec.train.objective import Batch
from tests.tiny.gradients import batches_of, run_settings
from tests.tiny.store import write_store

STEPS = range(3, 9)


@pytest.fixture(scope="module")
def batches(
    tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path
) -> Batches:
    """Two micro-batches of four sequences a step."""
    folder = tmp_path_factory.mktemp("loader")
    store = write_store(folder / "store", tiny_target, tiny_draft)
    return batches_of(run_settings(store, tiny_draft, folder / "run", 4, 2))


def same(one: Batch, other: Batch) -> bool:
    pairs = [(getattr(one, f.name), getattr(other, f.name)) for f in fields(Batch)]
    return all(a.equal(b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def test_it_reads_what_the_steps_need_and_no_more_than_it_may_keep(
    batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[list[Drawn]] = []
    direct = batches.read

    def read(self: Batches, micro: list[Drawn]) -> Batch:
        started.append(micro)
        assert threading.current_thread().name.startswith("read-ahead")
        return direct(micro)

    monkeypatch.setattr(Batches, "read", read)
    needed = [micro for step in STEPS for micro in batches.mine(step)]
    assert len(needed) == 2 * len(STEPS)
    with ReadAhead(batches, STEPS) as ahead:
        assert not started
        for taken, micro in enumerate(needed, 1):
            assert same(ahead(micro), direct(micro))
            assert taken <= len(started) <= taken + AHEAD
    assert started == needed
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]


def test_losses_are_those_of_reading_when_needed(batches: Batches) -> None:
    with ReadAhead(batches, STEPS) as ahead:
        for step in STEPS:
            found = [float(loss().detach()) for loss in batches.losses(step, ahead)]
            assert found == [float(loss().detach()) for loss in batches.losses(step)]


def test_what_cannot_be_read_is_told_where_it_is_needed(
    batches: Batches, monkeypatch: pytest.MonkeyPatch
) -> None:
    direct, broken = batches.read, batches.mine(STEPS[1])[0]

    def read(self: Batches, micro: list[Drawn]) -> Batch:
        if micro == broken:
            raise OSError("the disk is gone")
        return direct(micro)

    monkeypatch.setattr(Batches, "read", read)
    with ReadAhead(batches, STEPS) as ahead:
        for micro in batches.mine(STEPS[0]):
            ahead(micro)
        with pytest.raises(OSError, match="the disk is gone"):
            ahead(broken)
