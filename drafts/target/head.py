"""What a target makes of its last, normed hidden state: head, bias, scale and soft cap.

Which of these a target has, its config says; that they are all, and in this order, is checked
against transformers' own class of the target.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPast

from drafts.errors import UserError, first_line
from drafts.target.info import TargetInfo
from drafts.target.weights import find_head, load_embedding, load_matrix
from drafts.tensors import open_tensors

MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")
TOLERANCE = 1e-5  # of the largest logit: some classes return theirs in float32
TELLING = ("logit", "multiplier", "mup", "width")  # in names of fields that may change logits
PROBE = (4, 16)  # hidden states, and rows of a head, on which the class is tried


class TargetHead(nn.Module):
    """From normed hidden states to logits, as the target does it itself.

    `weight` [rows, d] and `bias` [rows] are of the whole vocabulary, or of some of its rows.
    """

    weight: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None, scale: float, cap: float | None):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)
        self.scale, self.cap = scale, cap

    def rows(self, ids: Tensor) -> TargetHead:
        """The same for some of the vocabulary, in the order of `ids`."""
        ids = ids.to(self.weight.device)
        bias = None if self.bias is None else self.bias[ids]
        return TargetHead(self.weight[ids], bias, self.scale, self.cap)

    def forward(self, final: Tensor) -> Tensor:
        """Logits [..., rows] of hidden states [..., d], both in the head's dtype."""
        logits = F.linear(final.to(self.weight.dtype), self.weight, self.bias)
        return scaled_and_capped(logits, self.scale, self.cap)


def scaled_and_capped(logits: Tensor, scale: float, cap: float | None) -> Tensor:
    """What follows the head, in the order of transformers' models that have both."""
    if scale != 1.0:
        logits = logits * scale
    return logits if cap is None else torch.tanh(logits / cap) * cap


def scale_and_cap(config: Any) -> tuple[float, float | None]:
    """What transformers' text `config` says of logits: a factor, and the soft cap (None: none)."""

    def number(name: str) -> float:
        value = getattr(config, name, None)
        return 1.0 if value is None else float(value)

    scale = prod(map(number, MULTIPLIERS))  # Cohere; Falcon-H1; Muse Glimmer
    scaling = number("logits_scaling")  # Granite and MiniCPM3 divide by it
    scale = scale * scaling if config.model_type.startswith("hyperclovax") else scale / scaling
    return scale, getattr(config, "final_logit_softcapping", None)  # Gemma, NanoChat


def load_target_head(target: TargetInfo) -> TargetHead:
    """The target's output layer with all that it does to logits, in the stored dtype.

    Raises `UserError` for a head that is packed or lacks tensors, and for a target whose class in
    transformers makes other logits than this head.
    """
    own = own_class(target)
    scale, cap = scale_and_cap(own.config)
    check_logits(own, scale, cap, target)
    return TargetHead(*stored_head(own, target), scale, cap)


def load_lm_head(target: TargetInfo) -> Tensor:
    """The target's output matrix alone, [vocab, hidden] (the embedding where they are tied)."""
    return stored_head(own_class(target), target)[0]


def logit_scale(target: TargetInfo) -> float:
    """The factor of the target's logits, for a fresh draft to begin with."""
    return scale_and_cap(own_class(target).config)[0]


def not_drafted(target: TargetInfo) -> list[str]:
    """What the target does to its logits beside scaling them, in words.

    Drafts in vLLM have a head and a factor of their own (`logit_scale`), but neither bias nor cap.
    """
    own = own_class(target)
    cap = scale_and_cap(own.config)[1]
    capped = [] if cap is None else [f"caps its logits at {cap:g}"]
    return capped + (["adds a bias to its logits"] if own.has_bias else [])


def model_class(folder: Path) -> tuple[Any, Any]:
    """transformers' config of a model, and what loads it: a causal LM, or one that sees images too.

    Raises what transformers raises for configs that it cannot read.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    alone = type(config) in AutoModelForCausalLM._model_mapping
    return config, AutoModelForImageTextToText if sees and not alone else AutoModelForCausalLM


@dataclass(frozen=True)
class OwnClass:
    """transformers' class of a target, its tensors without values."""

    model: Any
    name: str
    config: Any  # of the language model
    tied: bool
    has_bias: bool


def own_class(target: TargetInfo) -> OwnClass:
    """Build transformers' class of the target on no device. `UserError` where there is none."""
    try:
        config, of = model_class(target.folder)
        with torch.device("meta"):
            model = of.from_config(config, trust_remote_code=False)
    except Exception as error:  # a library boundary: every kind of foreign or damaged config
        raise UserError(
            f"transformers cannot build this target ({type(error).__name__}: {first_line(error)})",
            where=target.folder / "config.json",
            hint="check that transformers knows this architecture",
        ) from error
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if not isinstance(head, nn.Linear):
        raise UserError(
            f"{type(model).__name__} has no linear output layer ({type(head).__name__})",
            where=target.folder / "config.json",
            hint="use a causal language model as the target",
        )
    return OwnClass(
        model=model,
        name=type(model).__name__,
        config=config.get_text_config(),
        tied=head.weight is embedding.weight,
        has_bias=head.bias is not None,
    )


def stored_head(own: OwnClass, target: TargetInfo) -> tuple[Tensor, Tensor | None]:
    """Weight [vocab, hidden] and bias [vocab] as they are stored.

    Raises `UserError` where transformers would read other ones, or make some up.
    """
    tensors, found = open_tensors(target.folder), find_head(target)
    problem = None
    if found.weight is None and not own.tied:
        problem = "has no output layer (lm_head.weight), and its config does not tie it"
    if own.has_bias != (found.bias is not None):
        stored = "lacks the bias of" if own.has_bias else f"stores {found.bias} for"
        problem = f"{stored} its output layer, which {own.name} has{'' if own.has_bias else ' not'}"
    if problem:
        raise UserError(
            problem,
            where=target.folder,
            hint="fetch the model again: config and weights do not belong together",
        )
    bias = None if found.bias is None else tensors.load(found.bias)
    if found.weight is None:
        return load_embedding(target), bias
    weight = load_matrix(target, tensors, found.weight)
    if own.tied and not torch.equal(weight, load_embedding(target)):
        raise UserError(
            f"its config ties the output layer to the embedding, but {found.weight} differs from "
            "it: vLLM reads the embedding, others may not",
            where=target.folder,
            hint="set tie_word_embeddings to false in config.json, or remove that tensor, "
            "whichever is the model",
        )
    return weight, bias


@torch.no_grad()
def check_logits(own: OwnClass, scale: float, cap: float | None, target: TargetInfo) -> None:
    """Raise `UserError` unless `own`'s forward does to logits what a `TargetHead` does.

    Its decoder is made to return random states, which go through a small random head.
    """
    model, config = own.model, own.config
    generator = torch.Generator().manual_seed(0)
    count, rows = PROBE
    width = model.get_output_embeddings().in_features
    final = torch.randn(1, count, width, generator=generator, dtype=torch.float64)
    large = 2 * (cap or 1.0) / (scale * width**0.5)  # so that a cap shows
    head = nn.Linear(width, rows, bias=own.has_bias, dtype=torch.float64, device="cpu")
    for parameter in head.parameters():
        values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.copy_(values * large)
    expected = TargetHead(head.weight, head.bias, scale, cap)(final)
    for body in (model.base_model, model.get_decoder(), getattr(model, "model", model)):
        if body is not model:
            body.forward = lambda *args, **kwargs: Output(last_hidden_state=final)
    model.set_output_embeddings(head)
    try:
        found = model.eval()(input_ids=torch.zeros(1, count, dtype=torch.long)).logits
        same = (found - expected).abs().max() <= TOLERANCE * expected.abs().max()
        fault = "" if same else "makes other logits of its head's than its config's fields tell"
    except Exception as error:  # the class's own code, called in a way that it may not expect
        fault = f"does not show how it makes logits ({type(error).__name__}: {first_line(error)})"
    if fault:
        names = [n for n in config.to_dict() if any(part in n for part in TELLING)]
        named = f"; it has {', '.join(names)}" if names else ""
        raise UserError(
            f"{own.name} {fault}{named}",
            where=target.folder / "config.json",
            hint="use a target of another architecture: what this one's drafts should learn is not "
            "known",
        )


class Output(BaseModelOutputWithPast):
    """What any decoder returns: nothing but the states, whatever else is asked for."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
