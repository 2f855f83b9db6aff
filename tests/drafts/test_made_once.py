"""A folder of the cache: made whole, and once, however many ask for it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from drafts.files import make_once


def test_several_at_once_make_it_once(tmp_path: Path) -> None:
    made: list[Path] = []
    start = threading.Barrier(3)

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "a").write_text("a")
        time.sleep(0.2)
        (folder / "b").write_text("b")

    def ask(_: int) -> list[str]:
        start.wait()
        return sorted(path.name for path in make_once(tmp_path / "deep" / "model", make).iterdir())

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, range(3))) == [["a", "b"]] * 3
    assert len(made) == 1


def test_what_fails_leaves_nothing_and_is_made_by_the_next(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        make_once(tmp_path / "model", fail)
    assert not (tmp_path / "model").exists()
    make_once(tmp_path / "model", lambda folder: None)
    assert list((tmp_path / "model").iterdir()) == []
