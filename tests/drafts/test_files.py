"""Files that appear whole: what killed writers left goes, what others write stays."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

from drafts.files import atomic_file, remove_leftovers


def dead_process() -> int:
    return next(pid for pid in range(2, 10**6) if not psutil.pid_exists(pid))


def test_the_next_writer_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    path = tmp_path / "row[1].json"  # a name that is no pattern
    left = tmp_path / f".{path.name}.{dead_process()}.tmp"
    alive = tmp_path / f".{path.name}.{os.getppid()}.tmp"
    others = tmp_path / f".{path.name}.json.{dead_process()}.tmp"
    for one in (left, alive, others):
        one.write_text("half")
    with atomic_file(path) as temporary:
        temporary.write_text("whole")
    assert path.read_text() == "whole"
    assert set(tmp_path.iterdir()) == {path, alive, others}


def test_a_folder_between_its_two_renames_is_restored(tmp_path: Path) -> None:
    path = tmp_path / "merged"
    for owner, content in ((dead_process(), "whole"), (dead_process() + 10**6, "half")):
        folder = tmp_path / f".{path.name}.{owner}.{'old' if content == 'whole' else 'tmp'}"
        folder.mkdir()
        (folder / "file").write_text(content)
    remove_leftovers(path)
    assert (path / "file").read_text() == "whole"
    assert set(tmp_path.iterdir()) == {path}
