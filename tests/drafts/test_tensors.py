"""Which files are a model: the index decides, a missing shard is named, a tensor stands once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafts.errors import UserError
from drafts.files import INDEX, weight_files
from drafts.hashes import hash_model
from drafts.registry import read_draft
from drafts.target.info import read_target
from drafts.tensors import open_tensors
from tests.command import run_command
from tests.opened import convert, init_draft, load_lm_head, write_like
from tests.tiny.models import draft_config, draft_tensors, write_draft, write_target

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def shard(folder: Path) -> dict[str, torch.Tensor]:
    """Split the model's only file into two, with an index; returns its tensors."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {name: SHARDS[i % 2] for i, name in enumerate(tensors)}
    for file in SHARDS:
        own = {name: tensors[name] for name, at in weight_map.items() if at == file}
        save_file(own, folder / file, metadata={"format": "pt"})
    write_index(folder, weight_map)
    return tensors


def write_index(folder: Path, weight_map: dict[str, str]) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def sharded_target(folder: Path) -> Path:
    shard(write_target(folder))
    return folder


def test_files_beside_an_index_are_no_part_of_the_model(tmp_path: Path) -> None:
    target = sharded_target(tmp_path / "target")
    head, before = load_lm_head(target), read_target(target)
    stray = {"lm_head.weight": torch.zeros_like(head), "other": torch.zeros(3)}
    save_file(stray, target / "old_run.safetensors")
    assert [path.name for path in weight_files(target)] == list(SHARDS)
    assert torch.equal(load_lm_head(target), head)
    assert read_target(target).sha256 == before.sha256
    fresh = init_draft("eagle3", target)
    assert torch.equal(fresh.lm_head.weight, head.float())  # type: ignore[union-attr]


def test_a_stray_file_beside_a_sharded_draft_counts_nowhere(
    tmp_path: Path, tiny_target: Path
) -> None:
    base = write_draft(tmp_path / "base")
    tensors = shard(base)
    save_file({"fc.weight": torch.zeros(3)}, base / "old.safetensors")
    other = convert(base, "speculators", tmp_path / "other", tiny_target).folder
    written = tmp_path / "written"
    written.mkdir()
    write_like(base, written, {})
    for copy, more in ((written, 0), (other, 1)):  # the target's embedding
        assert sorted(path.name for path in copy.glob("*.safetensors")) == list(SHARDS)
        assert len(open_tensors(copy).headers) == len(tensors) + more


def test_a_missing_shard_is_named_before_anything_starts(tmp_path: Path, tiny_draft: Path) -> None:
    target = sharded_target(tmp_path / "target")
    (target / SHARDS[1]).unlink()
    code, error = run_command("inspect", tiny_draft, "--target", target)
    assert code == 2
    assert SHARDS[1] in error
    (target / INDEX).unlink()  # the number in its name tells as well
    with pytest.raises(UserError, match=SHARDS[1]):
        read_target(target)
    with pytest.raises(UserError, match=SHARDS[1]):
        hash_model(target)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ("not there", "names the tensor none.weight"),
        ("in the other", "names the tensor norm.weight"),
        ("outside", "no weight_map"),
        ("no map", "no weight_map"),
    ],
)
def test_an_index_that_does_not_hold_is_refused(tmp_path: Path, wrong: str, says: str) -> None:
    draft = write_draft(tmp_path / "draft")
    shard(draft)
    weight_map = json.loads((draft / INDEX).read_text())["weight_map"]
    if wrong == "not there":
        weight_map["none.weight"] = SHARDS[0]
    elif wrong == "in the other":
        weight_map["norm.weight"] = SHARDS[1 - SHARDS.index(weight_map["norm.weight"])]
    elif wrong == "outside":
        weight_map["norm.weight"] = f"../draft/{SHARDS[0]}"
    write_index(draft, weight_map)
    if wrong == "no map":
        (draft / INDEX).write_text("[]")
    with pytest.raises(UserError, match=says):
        read_draft(draft)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft")
    save_file({"norm.weight": torch.zeros(128)}, draft / "old.safetensors")
    with pytest.raises(UserError, match=r"norm\.weight stands in model\.safetensors and in old"):
        read_draft(draft)


def test_a_whole_file_beside_the_index_of_others_is_refused(tmp_path: Path) -> None:
    """transformers would load the one and vLLM the others."""
    draft = tmp_path / "draft"
    shard(write_draft(draft))
    save_file(draft_tensors(seed=2), draft / "model.safetensors")
    with pytest.raises(UserError, match=r"vLLM reads those of the index"):
        read_draft(draft)


def test_an_index_of_the_only_file(tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft")
    before = read_draft(draft)
    write_index(draft, dict.fromkeys(draft_tensors(), "model.safetensors"))
    assert read_draft(draft) == before
    assert json.loads((draft / "config.json").read_text()) == draft_config()
