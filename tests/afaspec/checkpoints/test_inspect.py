"""`afaspec inspect`: what it says of each family, of fits and misfits, of damage."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from drafts.checkpoint.family import InitOptions
from drafts.errors import UserError
from drafts.registry import FAMILIES, save_draft
from tests.command import run_command
from tests.drafts.test_registry import speculators_draft
from tests.opened import init_draft, inspect_draft, speculative_config
from tests.tiny.models import write_draft, write_target


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_described(
    family: str, target_of: Callable[[str], Path], tmp_path: Path
) -> None:
    target = target_of(family)
    draft = init_draft(family, target, InitOptions(layer_ids=(1, 2, 3)))
    save_draft(draft, family, tmp_path, dtype=torch.bfloat16)
    found = inspect_draft(tmp_path, target)
    assert found.fits
    assert (found.family, found.title) == (family, FAMILIES[family].title)
    assert found.layout == FAMILIES[family].formats[0]
    assert found.vocabulary_map is None
    stored = load_file(tmp_path / "model.safetensors")
    assert found.parameters == sum(t.numel() for t in stored.values() if t.is_floating_point())
    assert found.bytes == (tmp_path / "model.safetensors").stat().st_size
    k = found.speculative_config["num_speculative_tokens"]
    assert found.speculative_config == speculative_config(tmp_path, k)
    assert found.largest_k is None or k <= found.largest_k


def test_the_table_names_what_matters(
    tiny_draft: Path, tiny_target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _ = run_command("inspect", tiny_draft, "--target", tiny_target)
    assert code == 0
    shown = capsys.readouterr().out
    for text in (
        "EAGLE-3",
        "320 of the target's 512 ids (62%)",
        "one to one",
        "after layers 1, 2, 3",
        "embed_tokens",
        '"method": "eagle3"',
        "bfloat16",
    ):
        assert text in shown


def test_json_is_for_programs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draft = speculators_draft(tmp_path / "draft")
    record = {"made_by": "afaspec merge", "parity": {"float32": 1e-7}}
    (draft / "afaspec.json").write_text(json.dumps(record))
    code, _ = run_command("inspect", draft, "--json")
    assert code == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["layout"] == "speculators"
    assert shown["shared"] == []
    assert shown["layer_ids"] == [1, 2, 3]
    assert shown["made"] == record
    assert shown["checks"] is None


def test_a_merged_draft_says_how_it_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draft = write_draft(tmp_path / "draft")
    annealing = {"activation": "relu", "beta": 0.0}
    record = {"annealing": annealing, "parity": {"float32": 2e-7, "stored": 0.01}}
    (draft / "afaspec.json").write_text(json.dumps(record))
    run_command("inspect", draft)
    shown = capsys.readouterr().out
    assert "AFA-LoRA (relu, last beta 0)" in shown
    assert "2.0e-07" in shown


def test_a_misfit_is_exit_code_2_and_says_which_rows(
    tiny_draft: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_target(tmp_path / "other", vocab=600)
    code, _ = run_command("inspect", tiny_draft, "--target", other, "--json")
    assert code == 2
    shown = json.loads(capsys.readouterr().out)
    assert shown["fits"] is False
    assert [row["name"] for row in shown["checks"] if not row["ok"]] == ["vocabulary"]


def test_a_vocabulary_map_that_is_not_one_to_one(tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft")
    tensors = load_file(draft / "model.safetensors")
    tensors["d2t"][1] = tensors["d2t"][0] - 1  # ids 0 and 1 now mean the same token
    save_file(tensors, draft / "model.safetensors", metadata={"format": "pt"})
    code, error = run_command("inspect", draft, "--json")
    assert code == 2
    assert "two draft ids" in error


def test_layer_ids_that_are_not_named(tmp_path: Path, tiny_target: Path) -> None:
    draft = write_draft(tmp_path / "draft", eagle_aux_hidden_state_layer_ids=None)
    assert "2, L/2 and L-3" in inspect_draft(draft).hidden_states
    found = inspect_draft(draft, tiny_target)
    assert "after layers 2, 2, 1" in found.hidden_states
    assert not found.fits


def test_damage_is_one_message(tmp_path: Path, tiny_draft: Path) -> None:
    code, error = run_command("inspect", tmp_path / "nowhere")
    assert code == 2
    assert "no such" in error
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((tiny_draft / "config.json").read_bytes())
    data = (tiny_draft / "model.safetensors").read_bytes()
    (broken / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="truncated"):
        inspect_draft(broken)
