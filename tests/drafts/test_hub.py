"""Hub ids: fetched from a hub on this machine, pinned, cached, and refused with one clear error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafts.hub import is_hub_id, source
from drafts.registry import read_draft
from drafts.target.info import read_target
from tests.tiny.hub import BROKEN, GATED, SECRET, Hub, serve_hub
from tests.tiny.models import draft_tensors, write_draft

NOWHERE = "http://127.0.0.1:9"  # nothing listens there
FETCH = """
import json, sys
from drafts.errors import UserError
from drafts.hub import fetch
for text in json.loads(sys.argv[1]):
    try:
        print(json.dumps([str(fetch(text, pickles="--pickles" in sys.argv)), None]))
    except UserError as error:
        print(json.dumps([None, str(error)]))
"""


@pytest.fixture
def hub(tiny_target: Path, tiny_draft: Path) -> Iterator[Hub]:
    with serve_hub() as served:
        served.publish("tiny/target", tiny_target)
        served.publish("tiny/draft", tiny_draft)
        yield served


def run(
    arguments: list[Any], url: str, cache: Path, **environment: str
) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    ours = {"HF_ENDPOINT": url, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    root = str(Path(__file__).parents[2])
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=kept | ours | {"PYTHONPATH": root} | environment,
        cwd=cache,
        capture_output=True,
        text=True,
        check=False,
    )


def fetched(
    texts: list[str], url: str, cache: Path, *options: str, **environment: str
) -> list[tuple[str | None, str | None]]:
    """The folder or the error of each id, in a process of its own."""
    cache.mkdir(exist_ok=True)
    done = run(["-c", FETCH, json.dumps(texts), *options], url, cache, **environment)
    assert done.returncode == 0, done.stderr
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_what_is_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "here").mkdir(parents=True)
    for text in ("owner/name", "owner/Name-1.5_b", "o/n@main", "o/n@refs/pr/1", "o/n@0123abcd"):
        assert is_hub_id(text), text
    for text in ("./owner/name", "/owner/name", "~/name", "../name", "a/b/c", "name", "embedded",
                 "models/here", "owner/", "owner/name@", "base=o/n", "o/n@a b"):  # fmt: skip
        assert not is_hub_id(text), text


def test_only_what_is_needed_is_fetched_and_pinned(
    hub: Hub, tiny_draft: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "repository"
    shutil.copytree(tiny_draft, folder)
    (folder / "original").mkdir()
    for name in ("LICENSE", "README.md", "chat_template.jinja", "tokenizer.json"):
        (folder / name).write_text("{}")
    unwanted = ("modeling.py", "pytorch_model.bin", "flax_model.msgpack", "original/x.safetensors",
                "consolidated.safetensors", "model.gguf", "picture.png")  # fmt: skip
    for name in unwanted:
        (folder / name).write_bytes(b"x")
    commit = hub.publish("tiny/mixed", folder)
    cache = tmp_path / "cache"
    (found, error), (again, _) = fetched(["tiny/mixed", f"tiny/mixed@{commit}"], hub.url, cache)
    assert error is None
    assert found == again
    assert source(Path(found or "")) == f"tiny/mixed@{commit}"
    names = {path.name for path in Path(found or "").iterdir()}
    wanted = {"config.json", "model.safetensors", "LICENSE", "README.md"}
    assert names == wanted | {"chat_template.jinja", "tokenizer.json"}
    assert read_draft(Path(found or "")).sha256 == read_draft(tiny_draft).sha256
    downloads = len(hub.fetched)
    # Later the branch moves; what is pinned stays, and what is here is not fetched again.
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    moved = hub.publish("tiny/mixed", shutil.copytree(folder, tmp_path / "moved"))
    pinned = f"tiny/mixed@{commit}"
    hub.revisions["tiny/mixed"][commit] = folder
    (kept, _), (new, _) = fetched([pinned, "tiny/mixed"], hub.url, cache)
    assert kept == found
    assert source(Path(new or "")) == f"tiny/mixed@{moved}"
    assert len(hub.fetched) == downloads + 1  # the one config.json that changed


def test_without_a_network_the_cache_serves(hub: Hub, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    ((found, _),) = fetched(["tiny/draft"], hub.url, cache)
    texts = ["tiny/draft", "tiny/target"]
    for url, environment in ((NOWHERE, {}), (hub.url, {"HF_HUB_OFFLINE": "1"})):
        started = time.monotonic()
        (same, _), (none, error) = fetched(texts, url, cache, **environment)
        assert (same, none) == (found, None)
        assert error is not None
        assert error.startswith("tiny/target: no such folder here, not in the hub's cache, and")
        assert error.count("\n") == 1
        assert ("HF_HUB_OFFLINE is set" in error) == bool(environment)
        assert time.monotonic() - started < 120  # no endless trying


def test_shards_are_those_of_the_index(hub: Hub, tmp_path: Path) -> None:
    folder, tensors = write_draft(tmp_path / "sharded"), draft_tensors()
    (folder / "model.safetensors").unlink()
    places = {}
    for i, name in enumerate(tensors):
        places[name] = f"part-{1 + i % 2}.safetensors"
    for file in set(places.values()):
        part = {name: tensors[name] for name in tensors if places[name] == file}
        save_file(part, folder / file)
    save_file({"stray": torch.ones(1)}, folder / "stray.safetensors")
    index = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index)
    hub.publish("tiny/sharded", folder)
    ((found, _),) = fetched(["tiny/sharded"], hub.url, tmp_path / "cache")
    assert {path.name for path in Path(found or "").iterdir()} == {
        "config.json",
        "model.safetensors.index.json",
        "part-1.safetensors",
        "part-2.safetensors",
    }


def test_what_the_hub_refuses_is_one_clear_error(
    hub: Hub, tiny_draft: Path, tmp_path: Path
) -> None:
    hub.publish(GATED, tiny_draft)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "README.md").write_text("weights follow\n")
    hub.publish("tiny/empty", empty)
    texts = ["tiny/none", "tiny/draft@v9", GATED, BROKEN, "tiny/empty"]
    results = fetched(texts, hub.url, tmp_path / "cache")
    said = ("the hub has no such model, or a private one", "not this revision", "is gated",
            "the hub answers with an error", "holds no weights")  # fmt: skip
    for text, words, (found, error) in zip(texts, said, results, strict=True):
        assert found is None
        assert error is not None
        assert error.startswith(f"{text}: ")
        assert words in error
        assert "\nTo mend it: " in error
    ((found, error),) = fetched([GATED], hub.url, tmp_path / "cache", HF_TOKEN=SECRET)
    assert error is None
    assert read_draft(Path(found or "")).family == "eagle3"


def test_a_pickled_repository_is_fetched_by_convert_alone(
    hub: Hub, tiny_draft: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "repository"
    folder.mkdir()
    shutil.copyfile(tiny_draft / "config.json", folder / "config.json")
    torch.save(draft_tensors(), folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(b"x")
    hub.publish("tiny/pickled", folder)
    cache = tmp_path / "cache"
    ((found, error),) = fetched(["tiny/pickled"], hub.url, cache)
    assert found is None
    assert error is not None
    assert "only pytorch_model.bin, a pickle" in error
    assert "afaspec convert tiny/pickled --out NEW" in error
    out = tmp_path / "out"
    done = run(["-m", "afaspec", "convert", "tiny/pickled", "--out", out], hub.url, cache)
    assert done.returncode == 0, done.stderr
    for name, tensor in load_file(out / "model.safetensors").items():
        assert torch.equal(tensor, draft_tensors()[name])
    assert "tiny/pickled/training_args.bin" not in hub.fetched


def test_commands_take_hub_ids(hub: Hub, tmp_path: Path) -> None:
    commit = hub.commit("tiny/target", "main")
    cache, out = tmp_path / "cache", tmp_path / "there"
    cache.mkdir()
    target = f"tiny/target@{commit}"
    words = ["inspect", "tiny/draft", "--target", target, "--json"]
    done = run(["-m", "afaspec", *words], hub.url, cache)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert source(Path(shown["folder"])) == f"tiny/draft@{hub.commit('tiny/draft', 'main')}"
    assert shown["fits"] is True
    words = ["convert", "tiny/draft", "--to", "speculators", "--target", target, "--out", str(out)]
    done = run(["-m", "afaspec", *words], hub.url, cache)
    assert done.returncode == 0, done.stderr
    written = json.loads((out / "config.json").read_text())
    assert written["speculators_config"]["verifier"]["name_or_path"] == "tiny/target"
    read_target(cache / "hub" / "models--tiny--target" / "snapshots" / commit)
