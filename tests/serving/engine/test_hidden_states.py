"""Hidden states from real vLLM are those that transformers computes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from afaspec.capture.features import tapped
from drafts.errors import UserError
from drafts.target.info import read_target
from serving.engine.engine import EngineProcess, EngineSettings
from serving.runtime import divided_cores
from tests.tiny.models import LAYERS, VOCAB

LAYER_IDS = (0, 2, LAYERS)
# Within a block of vLLM's cache on a CPU (128 tokens), all of one, over it, and several.
LENGTHS = (1, 30, 128, 129, 300)


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCAB, (n,), generator=generator).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def engine(tiny_target: Path) -> Iterator[EngineProcess]:
    settings = EngineSettings(
        read_target(tiny_target),
        dtype="float32",
        max_model_len=max(LENGTHS) + 2,  # room for one token more than the longest
        enforce_eager=True,
        batch=2,  # of five texts, so that blocks are used again
        states_of=LAYER_IDS,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        with EngineProcess(settings) as running:
            yield running


@pytest.fixture(scope="module")
def model(tiny_target: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_target, dtype=torch.float32).eval()


def test_states_are_those_of_transformers(engine: EngineProcess, model: Any) -> None:
    sequences = texts()
    found = dict(engine.hidden_states(sequences))
    assert found.keys() == set(range(len(sequences)))
    for place, ids in enumerate(sequences):
        assert found[place].dtype == torch.float32
        with torch.inference_mode(), tapped(model, LAYER_IDS) as states:
            model.get_decoder()(input_ids=torch.tensor([ids]), use_cache=False)
            expected = torch.stack([states[i][0] for i in LAYER_IDS], dim=1)
        for layer in range(len(LAYER_IDS)):
            error = (found[place] - expected)[:, layer].norm() / expected[:, layer].norm()
            assert error < 1e-5  # float32, with sums in another order


def test_files_are_gone_when_they_are_read(engine: EngineProcess) -> None:
    list(engine.hidden_states(texts()[:2]))
    (folder,) = engine.log.parent.glob("*-states")
    assert list(folder.iterdir()) == []


def test_a_text_without_room_behind_it_is_refused(engine: EngineProcess) -> None:
    longest = max(LENGTHS) + 1
    ((_, states),) = engine.hidden_states([[5] * longest])
    assert len(states) == longest
    with pytest.raises(UserError, match="301 tokens at most, 302 are needed"):
        list(engine.hidden_states([[5] * (longest + 1)]))


@pytest.mark.parametrize("fault", ["unwritten", "short"])
def test_states_that_vllm_did_not_keep_are_noticed(
    engine: EngineProcess, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    def damaged(path: Path) -> dict[str, torch.Tensor]:
        states = load_file(path)["hidden_states"]
        if fault == "short":
            return {"hidden_states": states[:-1]}
        states[3] = 0
        return {"hidden_states": states}

    monkeypatch.setattr("safetensors.torch.load_file", damaged)
    with pytest.raises(UserError, match="kept no hidden states of some tokens"):
        list(engine.hidden_states([list(range(5, 25))]))


def test_cores_are_divided_among_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 2, 4, 6, 8})
    assert divided_cores(2) == "0,2|4,6"
    assert divided_cores(5) == "0|2|4|6|8"
    with pytest.raises(UserError, match="6 workers of an engine want a core each, 5 may be used"):
        divided_cores(6)
