"""Drafts of one build share an engine, and none sees that the others are there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from bench.engine.run import of_one_build
from bench.records.arms import Arm
from drafts.checkpoint.family import InitOptions
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.registry import read_draft, save_draft
from drafts.target.info import read_target
from serving.engine.engine import EngineProcess, EngineSettings
from serving.engine.shared import DraftOf, Engine
from serving.swap.fits import differences
from tests.opened import init_draft
from tests.tiny.models import write_draft

PROMPTS = [[5, 6, 7, 8], [300, 4, 4], [17, 40, 200, 9, 11]]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Another draft of the tiny one's build."""
    folder = write_draft(tmp_path / "other")
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["fc.weight"] = -tensors["fc.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    return folder


def two_layers(folder: Path, target: Path) -> DraftInfo:
    folder.mkdir()
    save_draft(
        init_draft("eagle3", target, InitOptions(num_layers=2)),
        "eagle3",
        folder,
        dtype=torch.float32,
    )
    return read_draft(folder)


def test_drafts_take_turns_in_one_engine(
    tiny_target: Path, tiny_draft: Path, other: Path, tmp_path: Path
) -> None:
    drafts = [read_draft(tiny_draft), read_draft(other)]
    settings = EngineSettings(
        read_target(tiny_target), drafts[0], k=2, dtype="float32", max_model_len=128,
        enforce_eager=True,
    )  # fmt: skip
    with EngineProcess(settings) as engine:
        first, second = (DraftOf(engine, draft) for draft in drafts)
        runs = [one.generate(PROMPTS, 48, ignore_eos=True) for one in (first, second, first)]
        with pytest.raises(UserError, match="cannot take the running draft's place"):
            engine.replace_draft(two_layers(tmp_path / "unfit", tiny_target))
        after = first.generate(PROMPTS, 48, ignore_eos=True)
    outputs = [[request.output_ids for request in run.requests] for run in (*runs, after)]
    assert outputs == 4 * [outputs[0]]
    assert runs[0].counters == runs[2].counters == after.counters
    assert runs[0].counters != runs[1].counters


def test_only_drafts_of_one_build_share(
    tiny_draft: Path, other: Path, tmp_path: Path, tiny_target: Path
) -> None:
    running, new = read_draft(tiny_draft), read_draft(other)
    engine = EngineProcess.__new__(EngineProcess)  # one that is never asked
    engine.settings = EngineSettings(target=read_target(tiny_target), draft=running)
    engines: dict[str, Engine] = {"base": DraftOf(engine, running)}
    assert of_one_build(Arm("new", new), engines) is engine
    assert of_one_build(Arm("new", new, {"rejection_sample_method": "block"}), engines) is None
    assert of_one_build(Arm("none"), engines) is None
    assert of_one_build(Arm("ngram", "ngram"), engines) is None
    for changed, said in (
        ({"seed": 2}, ["drafts from another vocabulary (d2t)"]),
        ({"norm_before_residual": True}, ["norm_before_residual is True, not None"]),
        ({"rms_norm_eps": 1e-5}, ["rms_norm_eps is 1e-05, not 1e-06"]),
    ):
        draft = read_draft(write_draft(tmp_path / str(changed), **changed))
        assert differences(running, draft) == said
        assert of_one_build(Arm("new", draft), engines) is None
    about = write_draft(tmp_path / "about", torch_dtype="float32", transformers_version="9")
    assert differences(running, read_draft(about)) == []
