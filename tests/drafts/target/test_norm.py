"""A target's final norm alone does what transformers' own model does before its head."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from afaspec.capture.features import FINAL, tapped
from drafts.checkpoint.load import load_causal_lm
from drafts.errors import UserError
from drafts.target.info import read_target
from drafts.target.norm import load_final_norm
from tests.tiny.architectures import (
    architectures,
    multimodal,
    write_architecture,
    write_multimodal,
)


@pytest.mark.parametrize("name", [*architectures(), *(f"{one}, images" for one in multimodal())])
def test_it_is_the_models_own(name: str, tmp_path: Path) -> None:
    sees = name.endswith(", images")
    write = write_multimodal if sees else write_architecture
    target = read_target(write(tmp_path / "target", name.removesuffix(", images")))
    model, _, _ = load_causal_lm(target.folder, torch.float32, "target")
    last = target.num_layers
    with torch.inference_mode(), tapped(model.eval(), (last,)) as states:
        model.get_decoder()(input_ids=torch.arange(10, 40)[None], use_cache=False)
        found = load_final_norm(target, torch.float32)(states[last])
        assert torch.equal(found, states[FINAL])
        assert not torch.equal(states[last], states[FINAL])


def test_a_target_that_does_more_behind_its_norm_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.llama.modeling_llama import LlamaModel

    target = read_target(write_architecture(tmp_path / "target", "Llama"))
    forward = LlamaModel.forward

    def scaled(self: LlamaModel, *args: object, **kwargs: object) -> object:
        output = forward(self, *args, **kwargs)
        output.last_hidden_state = output.last_hidden_state * 2
        return output

    monkeypatch.setattr(LlamaModel, "forward", scaled)
    with pytest.raises(UserError, match="does not show where its final norm is"):
        load_final_norm(target, torch.float32)


def test_a_norm_of_another_size_or_name_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = write_architecture(tmp_path / "target", "Llama")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    whole = tensors.pop("model.norm.weight")
    for changed in ({"model.norm.weight": whole[:-1].clone()}, {"model.odd.weight": whole}):
        save_file(tensors | changed, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match="its final norm should have"):
            load_final_norm(read_target(folder), torch.float32)
