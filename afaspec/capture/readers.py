"""Whose forward gives the hidden states of finished texts: transformers' in this process, or vLLM's
beside it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from afaspec.capture.memory import engine_cache_gib
from afaspec.capture.plan import CapturePlan
from afaspec.capture.target_model import load_target

if TYPE_CHECKING:
    from torch import Tensor

    from afaspec.capture.features import States

FORWARD_TOKENS = 8192  # through transformers' model at a time
AT_ONCE = 16  # texts that vLLM reads together


class Reader(Protocol):
    """What reads finished texts."""

    def read(self, sequences: Sequence[Sequence[int]]) -> Iterator[States]:
        """Yield the states of each sequence, in order."""

    def close(self) -> None:
        """Free what it holds."""


def open_reader(plan: CapturePlan, model: Any = None) -> Reader:
    """The reader of this capture; `model` is the target where transformers has it loaded."""
    if plan.read_with == "vllm":
        return VllmReader(plan)
    return TransformersReader(plan, model)


class TransformersReader:
    """The model in this process."""

    def __init__(self, plan: CapturePlan, model: Any = None):
        self.plan = plan
        self.model = model or load_target(plan.target.folder, plan.dtype, plan.device)

    def read(self, sequences: Sequence[Sequence[int]]) -> Iterator[States]:
        from afaspec.capture.features import features

        yield from features(self.model, sequences, self.plan.layer_ids, FORWARD_TOKENS)

    def close(self) -> None:
        pass


class VllmReader:
    """vLLM's engine in a child process: the target as it is served, quantized or over several
    devices. What it gives is the residual stream; the final norm is done here."""

    def __init__(self, plan: CapturePlan):
        import torch

        from drafts.target.norm import load_final_norm
        from serving.engine.engine import EngineProcess, EngineSettings

        self.plan = plan
        layers = plan.target.num_layers
        self._taken = sorted({*plan.layer_ids, layers})
        self._norm = load_final_norm(plan.target, getattr(torch, plan.dtype))
        longest = max(plan.longest(asked) for asked in plan.prompts) + 1  # vLLM writes a token
        self._engine = EngineProcess(
            EngineSettings(
                plan.target,
                dtype=plan.dtype,
                max_model_len=min(longest, plan.target.max_positions or longest),
                enforce_eager=plan.config.enforce_eager,
                batch=AT_ONCE,
                cache_gib=engine_cache_gib(plan, longest, AT_ONCE, len(self._taken)),
                states_of=tuple(self._taken),
                tensor_parallel=plan.config.tensor_parallel,
            )
        )

    def read(self, sequences: Sequence[Sequence[int]]) -> Iterator[States]:
        early: dict[int, States] = {}
        place = 0
        for found, states in self._engine.hidden_states(sequences):
            early[found] = self._states(states)
            while place in early:
                yield early.pop(place)
                place += 1

    def close(self) -> None:
        self._engine.close()

    def _states(self, taken: Tensor) -> States:
        """Of one sequence, from what vLLM gave of each layer, [n, layers, d]."""
        import torch

        with torch.inference_mode():
            final = self._norm(taken[:, -1].to(next(self._norm.parameters()).dtype))
            wanted = [taken[:, self._taken.index(i)] for i in self.plan.layer_ids]
            hidden = torch.cat(wanted or [final[:, :0]], dim=-1)
        return hidden.to(torch.bfloat16), final.to(torch.bfloat16)
