"""Hashes kept on disk: a large file is read once, and read again whenever it has changed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from drafts import hashes
from drafts.hashes import hash_file, hash_model
from drafts.registry import read_draft
from drafts.target.info import read_target
from serving.speculation import engine_options
from tests.opened import inspect_draft, require_compatible

SIZE = hashes.LARGE + 5


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AFASPEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "hashes"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files count as settled as soon as they are written."""
    monkeypatch.setattr(hashes, "SETTLED", -1.0)


def large(path: Path, letter: bytes = b"a") -> Path:
    path.write_bytes(letter * SIZE)
    return path


def digest(letter: bytes) -> str:
    return hashlib.sha256(letter * SIZE).hexdigest()


def kept(cache: Path) -> list[Path]:
    return sorted(path for path in cache.rglob("*") if path.is_file())


@pytest.mark.usefixtures("at_once")
def test_a_large_file_is_read_once(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = large(tmp_path / "weights")
    assert hash_file(path) == digest(b"a")
    (record,) = kept(cache)
    monkeypatch.setattr(hashes, "read_hash", lambda path: pytest.fail(f"{path} is read"))
    assert hash_file(path) == digest(b"a")
    link = tmp_path / "link"
    link.symlink_to(path)
    assert hash_file(link) == digest(b"a")
    assert kept(cache) == [record]


@pytest.mark.usefixtures("at_once")
def test_a_changed_file_is_read_anew(tmp_path: Path, cache: Path) -> None:
    """Also where size and modification time are as before: in place, or by another file."""
    path = large(tmp_path / "weights")
    first = path.stat()
    assert hash_file(path) == digest(b"a")
    large(path, b"b")
    os.utime(path, ns=(first.st_atime_ns, first.st_mtime_ns))
    assert hash_file(path) == digest(b"b")
    other = large(tmp_path / "other", b"c")
    os.utime(other, ns=(first.st_atime_ns, first.st_mtime_ns))
    other.replace(path)
    assert hash_file(path) == digest(b"c")


def test_what_was_just_written_is_not_kept(tmp_path: Path, cache: Path) -> None:
    """It might be written again within one tick of the file system's clock."""
    path = large(tmp_path / "weights")
    assert hash_file(path) == digest(b"a")
    assert kept(cache) == []


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"file": [], "sha256": "0"}'])
def test_a_damaged_record_is_not_believed(text: str, tmp_path: Path, cache: Path) -> None:
    path = large(tmp_path / "weights")
    hash_file(path)
    (record,) = kept(cache)
    record.write_text(text)
    assert hash_file(path) == digest(b"a")
    assert digest(b"a") in record.read_text()


@pytest.mark.usefixtures("at_once")
def test_without_a_cache_the_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("AFASPEC_CACHE", str(tmp_path / "file"))
    assert hash_file(large(tmp_path / "weights")) == digest(b"a")


def test_processes_side_by_side_agree(tmp_path: Path, cache: Path) -> None:
    path = large(tmp_path / "weights")
    code = (
        "import sys; from pathlib import Path; from drafts import hashes; hashes.SETTLED = -1.0\n"
        "print({hashes.hash_file(Path(sys.argv[1])) for _ in range(20)})"
    )
    command = [sys.executable, "-c", code, str(path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert {p.communicate()[0].strip() for p in running} == {str({digest(b"a")})}
    assert len(kept(cache)) == 1


def test_a_models_hash_is_as_it_was(tmp_path: Path) -> None:
    """Stores, runs and reports of earlier versions hold it."""
    (tmp_path / "config.json").write_text("{}\n")
    for name, letter in (("b.safetensors", b"b"), ("a.safetensors", b"a")):
        (tmp_path / name).write_bytes(letter)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert hash_model(tmp_path) == (
        "7480fbac3dddf02d44b9f683dceb5058490a735b0a9bd9540e99408431d636ee"
    )


def test_reading_and_serving_hash_nothing(
    tiny_target: Path, tiny_draft: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A target of 140 GB is not read for what its config and headers say."""
    read: list[Path] = []

    def watched(path: Path) -> str:
        read.append(path)
        return "0" * 64

    monkeypatch.setattr(hashes, "read_hash", watched)
    monkeypatch.setattr(hashes, "LARGE", 0)
    monkeypatch.setattr(hashes, "read_kept", lambda kept, identity: None)
    target, draft = read_target(tiny_target), read_draft(tiny_draft)
    require_compatible(tiny_target, tiny_draft)
    engine_options(target, draft)
    assert read == []
    inspect_draft(tiny_draft, tiny_target)
    assert {path.parent for path in read} == {tiny_draft}
    count = len(read)
    assert draft.sha256 == draft.sha256
    assert len(read) == count + 2  # config and weights, once
