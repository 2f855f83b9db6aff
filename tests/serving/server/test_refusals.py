"""What `afaspec serve` refuses, with one clear error, before vLLM starts."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import pytest

from drafts.errors import UserError
from drafts.target.info import read_target
from serving.server.process import listening_socket
from serving.server.serve import serve
from tests.opened import compare, require_compatible, speculative_config
from tests.serving.server.servers import serving
from tests.tiny.models import write_draft, write_target


def test_the_tiny_pair_fits(tiny_target: Path, tiny_draft: Path) -> None:
    checks = require_compatible(tiny_target, tiny_draft)
    names = {check.name for check in checks}
    assert names == {
        "method",
        "vocabulary",
        "hidden size",
        "layer ids",
        "positions",
        "rope",
        "dtype",
    }


@pytest.mark.parametrize(
    ("layer_ids", "complaint"),
    [
        ([1, 2, 9], r"layer ids: the target has 0 to 4, the draft \[1, 2, 9\]"),
        ([3, 2, 1], r"layer ids.*\[3, 2, 1\]"),
        ([1, 3], r"names 2 layers \[1, 3\], but vLLM fuses 3"),
        ([2, 2, 3], "expected distinct"),
        ([-1, 2, 3], "expected distinct"),
        (None, r"layer ids.*\[2, 2, 1\]"),
    ],
)
def test_wrong_layer_ids(
    layer_ids: list[int] | None, complaint: str, tiny_target: Path, tmp_path: Path
) -> None:
    draft = write_draft(tmp_path / "draft", eagle_aux_hidden_state_layer_ids=layer_ids)
    with pytest.raises(UserError, match=complaint):
        require_compatible(tiny_target, draft)


def test_layer_0_means_the_embeddings(tiny_target: Path, tmp_path: Path) -> None:
    draft = write_draft(tmp_path / "draft", eagle_aux_hidden_state_layer_ids=[0, 2, 4])
    assert require_compatible(tiny_target, draft)


def test_a_draft_of_another_target_names_every_wrong_row(tiny_draft: Path, tmp_path: Path) -> None:
    other = write_target(tmp_path / "other", hidden=256, vocab=600, layers=2)
    with pytest.raises(UserError) as caught:
        require_compatible(other, tiny_draft)
    for row in ("vocabulary", "hidden size", "layer ids"):
        assert row in str(caught.value)


def test_differences_that_are_allowed_are_notes(tiny_target: Path, tmp_path: Path) -> None:
    rope = {"rope_type": "default", "rope_theta": 500.0}
    draft = write_draft(tmp_path / "d", rope_parameters=rope, max_position_embeddings=64)
    checks = {check.name: check for check in compare(tiny_target, draft)}
    assert all(check.ok for check in checks.values())
    assert checks["rope"].note
    assert "64" in checks["positions"].note


def test_weights_that_are_not_floats(tiny_target: Path, tiny_draft: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    draft = Path(shutil.copytree(tiny_draft, tmp_path / "draft"))
    tensors = load_file(draft / "model.safetensors")
    tensors["fc.weight"] = tensors["fc.weight"].to(torch.int8)
    save_file(tensors, draft / "model.safetensors")
    with pytest.raises(UserError, match="dtype"):
        require_compatible(tiny_target, draft)


def test_nothing_starts_for_a_draft_that_does_not_fit(tiny_draft: Path, tmp_path: Path) -> None:
    other = write_target(tmp_path / "other", vocab=600)
    with serving(tmp_path, str(other), "--draft", str(tiny_draft), "--") as command:
        assert command.process.wait(timeout=120) == 2
        assert command.err.count("Error:") == 1
        assert "vocabulary" in command.err
        assert "Traceback" not in command.err
        assert not command.log.exists()


def test_port_in_use(tiny_target: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}"):
            serve(read_target(tiny_target), None, port=port)


def test_port_0_takes_a_free_one() -> None:
    with listening_socket("127.0.0.1", 0) as bound:
        assert bound.getsockname()[1] > 0
    with pytest.raises(UserError, match="cannot listen"):
        listening_socket("192.0.2.1", 8000)  # an address that no machine has


def test_speculative_config_comes_from_the_draft(tiny_draft: Path) -> None:
    config = speculative_config(tiny_draft, 3, draft_sample_method="greedy")
    assert config == {
        "method": "eagle3",
        "model": str(tiny_draft),
        "num_speculative_tokens": 3,
        "draft_sample_method": "greedy",
    }
    assert speculative_config(None, 3) is None
    ngram = speculative_config("ngram", 4)
    assert ngram is not None
    assert (ngram["method"], ngram["num_speculative_tokens"]) == ("ngram", 4)
    with pytest.raises(UserError, match="k is 0"):
        speculative_config("ngram", 0)


def test_a_draft_of_another_family_is_refused(tiny_draft: Path, tmp_path: Path) -> None:
    draft = Path(shutil.copytree(tiny_draft, tmp_path / "draft"))
    config = json.loads((draft / "config.json").read_text())
    config["architectures"] = ["MLPSpeculatorPreTrainedModel"]
    (draft / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="MLPSpeculatorPreTrainedModel"):
        speculative_config(draft, 3)
