"""Models by name in whole commands: what a run began with is what it goes on and is merged with."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest

from afaspec.cli.measure.models import ModelNames
from afaspec.pairs.names import open_draft, pinned, resolve_model, served_name
from afaspec.train.config import TrainConfig
from drafts.errors import UserError
from drafts.files import read_json
from drafts.hub import fetch, source
from tests.command import run_command
from tests.tiny.hub import Hub, serve_hub
from tests.tiny.models import write_draft
from tests.tiny.store import write_store


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub and an empty cache, in this process."""
    constants = huggingface_hub.constants
    with serve_hub() as served:
        template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", served.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        fetch.cache_clear()
        yield served
        fetch.cache_clear()


def test_a_run_keeps_the_draft_that_it_began_with(
    hub: Hub, tiny_target: Path, tiny_draft: Path, tmp_path: Path
) -> None:
    commit = hub.publish("tiny/draft", tiny_draft)
    target_commit = hub.publish("tiny/target", tiny_target)
    store = write_store(tmp_path / "store", resolve_model("tiny/target"), tiny_draft, prompts=12)
    recorded = Path(read_json(store / "manifest.json")["target"]["path"])
    assert source(recorded) == f"tiny/target@{target_commit}"
    run = tmp_path / "run"
    command = ["train", "--store", store, "--draft", "tiny/draft", "--out", run, "--steps", 2]
    command += ["--rank", 2, "--batch-size", 2, "--eval-every", 2, "--arm", "lora"]
    code, error = run_command(*command)
    assert code == 0, error
    assert read_json(run / "config.json")["draft"] == f"tiny/draft@{commit}"

    moved = hub.publish("tiny/draft", write_draft(tmp_path / "other", seed=7))
    assert moved != commit
    fetch.cache_clear()
    code, error = run_command(*command)
    assert code == 2
    assert "belongs to a run with another draft" in error
    shutil.rmtree(tmp_path / "cache")  # it can be fetched again, as what it was
    code, error = run_command("merge", run, "--out", tmp_path / "merged")
    assert code == 0, error
    record = read_json(tmp_path / "merged" / "afaspec.json")
    assert record["base_sha256"] == open_draft(tiny_draft).sha256


def test_names_of_drafts_that_are_measured(hub: Hub, tiny_draft: Path) -> None:
    commit = hub.publish("tiny/draft", tiny_draft)
    folder = fetch("tiny/draft")
    given = ["base=tiny/draft", f"tiny/draft@{commit}", f"mine={tiny_draft}", str(tiny_draft)]
    assert ModelNames(draft=given).open_drafts() == [
        f"base={folder}",
        f"draft={folder}",
        f"mine={tiny_draft}",
        str(tiny_draft),
    ]
    arms = ModelNames(draft=given[:1]).open_arms(none=True)
    assert [arm.name for arm in arms] == ["none", "base"]


def test_a_path_is_never_a_hub_id(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(store=tmp_path, draft="./tiny/draft", out=tmp_path)
    assert config.draft == "./tiny/draft"  # a Path would have lost the ./
    for name in ("./tiny/draft", "~/tiny/draft", str(tmp_path / "tiny"), "a/tiny/draft"):
        assert pinned(name) == name
        with pytest.raises(UserError, match="no such"):
            open_draft(name)
    assert hub.fetched == []


HUB = "hub/models--tiny--target/snapshots/0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("target", "adapter", "name"),
    [
        ("embedded", None, "embedded"),
        ("tiny/target", None, "tiny/target"),
        ("tiny/target@main", None, "tiny/target"),
        ("../models/Llama-3.1-8B", None, "Llama-3.1-8B"),
        ("../models/Llama-3.1-8B/", None, "Llama-3.1-8B"),
        ("models/a b/../c", None, "c"),
        (HUB, None, "tiny/target"),
        ("embedded", "adapters/support", "embedded+support"),
        ("tiny/target@main", "adapters/support/", "tiny/target+support"),
    ],
)
def test_a_server_calls_a_target_as_its_user_does(
    target: str, adapter: str | None, name: str
) -> None:
    assert served_name(target, Path(adapter) if adapter else None) == name


def test_a_folder_is_called_as_itself_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "current").symlink_to("new")
    monkeypatch.chdir(tmp_path / "new")
    assert served_name(".") == "new"
    assert served_name("../current") == "current"
