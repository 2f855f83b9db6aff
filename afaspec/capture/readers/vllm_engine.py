"""Reading with vLLM's engine in a process of its own: the target as it is served, quantized or over
several devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from afaspec.capture.memory import engine_cache_gib
from afaspec.capture.states import ToRead

if TYPE_CHECKING:
    from torch import Tensor

    from afaspec.capture.features import States

AT_ONCE = 16  # texts that run together


class VllmReader:
    """What vLLM gives is the residual stream; the final norm is done here.

    Make it in the main thread: its engine ends with the thread that started it.
    """

    def __init__(self, what: ToRead):
        import torch

        from drafts.target.norm import load_final_norm
        from serving.engine.engine import EngineProcess, EngineSettings

        self.what = what
        self._taken = sorted({*what.layer_ids, what.target.num_layers})
        self._norm = load_final_norm(what.target, getattr(torch, what.dtype))
        longest = what.longest + 1  # vLLM writes a token
        self._engine = EngineProcess(
            EngineSettings(
                what.target,
                dtype=what.dtype,
                max_model_len=min(longest, what.target.max_positions),
                enforce_eager=what.enforce_eager,
                batch=AT_ONCE,
                cache_gib=engine_cache_gib(
                    what.target, what.dtype, what.device, longest, AT_ONCE, len(self._taken)
                ),
                states_of=tuple(self._taken),
                tensor_parallel=what.tensor_parallel,
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
            wanted = [taken[:, self._taken.index(i)] for i in self.what.layer_ids]
            hidden = torch.cat(wanted or [final[:, :0]], dim=-1)
        return hidden.to(torch.bfloat16), final.to(torch.bfloat16)
