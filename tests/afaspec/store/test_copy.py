"""A store goes to other places and comes back, whole or not at all."""

from __future__ import annotations

import functools
import hashlib
import shutil
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from afaspec.store.copy import copy_store
from afaspec.store.manifest import read_manifest
from afaspec.store.read import FeatureStore
from drafts.errors import UserError
from tests.command import run_command
from tests.tiny.store import write_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, tiny_target: Path, tiny_draft: Path) -> Path:
    """Some shards, and the prompts that lie beside those of a target's own."""
    folder = tmp_path_factory.mktemp("copy") / "store"
    write_store(folder, tiny_target, tiny_draft, shard_mib=0.1)
    (folder / "self_prompts.jsonl").write_text("{}\n")
    assert len(read_manifest(folder).shards) >= 3
    return folder


def digests(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


@pytest.fixture
def web(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """A real server, and the folder that it serves."""
    folder = tmp_path / "web"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder)) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_address[1]}", folder
        made.shutdown()


def test_there_and_back(store: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    bucket = "memory://bucket/stores/one"
    copy_store(str(store), bucket, lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == sum(one.bytes for one in read_manifest(store).shards)
    assert seen == sorted(seen)
    copy_store(bucket, str(tmp_path / "back"))
    assert digests(tmp_path / "back") == digests(store)
    FeatureStore.open(tmp_path / "back", verify=True)


def test_from_a_server_by_the_command(store: Path, web: tuple[str, Path], tmp_path: Path) -> None:
    address, folder = web
    shutil.copytree(store, folder / "store")
    code, said = run_command("copy", f"{address}/store", tmp_path / "here")
    assert code == 0, said
    assert f"{tmp_path / 'here'}: 24 sequences" in said
    assert digests(tmp_path / "here") == digests(store)


def test_an_interrupted_copy_is_no_store_and_is_gone_on_with(store: Path, tmp_path: Path) -> None:
    first = read_manifest(store).shards[0]

    def stop(done: int, total: int) -> None:
        if done > first.bytes:
            raise KeyboardInterrupt

    there = tmp_path / "there"
    with pytest.raises(KeyboardInterrupt):
        copy_store(str(store), str(there), stop)
    with pytest.raises(UserError, match="not a feature store"):
        FeatureStore.open(there)
    before = (there / first.file).stat().st_mtime_ns
    (there / read_manifest(store).shards[2].file).write_bytes(b"half")
    copy_store(str(store), str(there))
    assert digests(there) == digests(store)
    assert (there / first.file).stat().st_mtime_ns == before  # was not copied again


def test_a_shard_that_was_changed_is_refused(store: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(store, broken)
    shard = broken / read_manifest(store).shards[1].file
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"shard-00001.*SHA-256 differs"):
        copy_store(str(broken), str(tmp_path / "there"))
    assert not (tmp_path / "there" / shard.name).exists()
    assert not (tmp_path / "there" / "manifest.json").exists()


def test_what_a_store_has_grown_by_is_brought(
    tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    store = write_store(tmp_path / "store", tiny_target, tiny_draft, limit=9)
    place = f"memory://grown/{tmp_path.name}"
    copy_store(str(store), place)
    write_store(store, tiny_target, tiny_draft, limit=20)
    copy_store(str(store), place)
    copy_store(place, str(tmp_path / "back"))
    assert len(FeatureStore.open(tmp_path / "back", verify=True)) == 20


def test_another_store_is_left_alone(
    store: Path, tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    other = write_store(tmp_path / "other", tiny_target, tiny_draft, word="class")
    before = digests(other)
    with pytest.raises(UserError, match="another store is there already"):
        copy_store(str(store), str(other))
    assert digests(other) == before


@pytest.mark.parametrize("name", ["../out.safetensors", "/tmp/out.safetensors", "a/b.safetensors"])
def test_a_manifest_names_no_file_outside_its_folder(
    name: str, store: Path, tmp_path: Path
) -> None:
    """A store from elsewhere must not write where it likes."""
    evil = tmp_path / "evil"
    shutil.copytree(store, evil)
    first = read_manifest(store).shards[0].file
    text = (evil / "manifest.json").read_text()
    (evil / "manifest.json").write_text(text.replace(first, name))
    with pytest.raises(UserError, match=r"garbles 'shards\.0\.file'"):
        copy_store(str(evil), str(tmp_path / "there"))
    with pytest.raises(UserError, match=r"garbles 'shards\.0\.file'"):
        FeatureStore.open(evil)
    assert not (tmp_path / "there").exists()


def test_a_place_that_fails_is_the_one_that_is_named(store: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(store, broken)
    (broken / read_manifest(store).shards[1].file).unlink()
    with pytest.raises(UserError, match=r"^\S+/broken: is not there"):
        copy_store(str(broken), str(tmp_path / "there"))


def test_what_cannot_be_copied_is_said_in_one_message(
    store: Path, tmp_path: Path, web: tuple[str, Path]
) -> None:
    unfinished = tmp_path / "unfinished"
    shutil.copytree(store, unfinished)
    manifest = read_manifest(unfinished)
    manifest.complete = False
    manifest.write(unfinished)
    for source, to, complaint in (
        (str(tmp_path / "nowhere"), "memory://x", "nowhere: is not a feature store"),
        (f"{web[0]}/nothing", "memory://x", "nothing: is not a feature store"),
        ("http://127.0.0.1:9/store", "memory://x", "failed"),
        (str(unfinished), "memory://x", "is not finished: 24 sequences"),
        ("gopher://x/store", "memory://x", "cannot be opened"),
        (str(store), f"{web[0]}/there", "failed"),
    ):
        with pytest.raises(UserError, match=complaint):
            copy_store(source, to)
    assert not fsspec.filesystem("memory").exists("x")
