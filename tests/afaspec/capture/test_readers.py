"""A store whose hidden states vLLM gave is that of transformers, but for rounding."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from pydantic import ValidationError

from afaspec.capture.config import CaptureConfig
from afaspec.capture.states import choose_reader
from drafts.errors import UserError
from drafts.target.info import read_target
from tests.opened import capture

TENSORS = ("hidden", "final")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    pairs = [(f"def f{i}(x):\n" * (1 + i % 4), f"    return {i}\n" * (1 + i)) for i in range(9)]
    path.write_text("".join(json.dumps({"prompt": p, "response": r}) + "\n" for p, r in pairs))
    return path


def config(target: Path, rows: Path, out: Path, **more: Any) -> CaptureConfig:
    return CaptureConfig(
        target=str(target),
        prompts=str(rows),
        out=out,
        layer_ids="3,1",  # not in order: they are kept as they are asked for
        use_responses=True,
        max_new_tokens=40,
        batch_size=4,
        dtype="float32",
        enforce_eager=True,
        **more,
    )


def test_vllm_gives_what_transformers_gives(
    tiny_target: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On two devices (here cores) where there are two."""
    devices = min(2, len(os.sched_getaffinity(0)))
    usual = capture(config(tiny_target, rows, tmp_path / "usual"))
    more: dict[str, Any] = {"states_with": "vllm", "tensor_parallel": devices}
    served = config(tiny_target, rows, tmp_path / "served", **more)
    store = capture(served)
    assert usual.manifest.settings["states_with"] is None
    assert store.manifest.settings["states_with"] == "vllm"
    assert len(store) == len(usual) == 9
    for one, other in zip(store, usual, strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.loss_mask, other.loss_mask)
        for name in TENSORS:
            found, expected = getattr(one, name), getattr(other, name)
            assert found.dtype == expected.dtype == torch.bfloat16
            # both are rounded to bf16, and some to the other neighbour
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-4)

    monkeypatch.setattr("serving.engine.engine.EngineProcess.__init__", None)
    assert len(capture(served)) == 9  # complete: nothing starts
    with pytest.raises(UserError, match="states_with was vllm, now it is None"):
        capture(config(tiny_target, rows, tmp_path / "served"))


def test_transformers_cannot_write_for_vllm(tiny_target: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="--states-with vllm wants --generate-with vllm"):
        config(tiny_target, rows, tmp_path, states_with="vllm", generate_with="transformers")


def test_quantized_targets_on_a_gpu_are_read_as_they_are_served(
    tiny_target: Path, tmp_path: Path
) -> None:
    def chosen(device: str, wanted: Literal["auto", "transformers", "vllm"] = "auto") -> str:
        return choose_reader(wanted, read_target(folder), device)

    folder = tmp_path / "target"
    folder.mkdir()
    for file in tiny_target.iterdir():
        (folder / file.name).symlink_to(file)
    assert chosen("cuda") == chosen("cpu") == "transformers"
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(
        json.dumps(raw | {"quantization_config": {"quant_method": "gptq"}})
    )
    assert chosen("cuda:1") == chosen("cuda") == chosen("cpu", "vllm") == "vllm"
    assert chosen("cpu") == chosen("cuda", "transformers") == "transformers"
