"""Writing with vLLM's engine in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from afaspec.capture.memory import LARGEST_BATCH, engine_cache_gib
from afaspec.capture.plan import Setup
from afaspec.capture.writers.protocol import OnStep, number_of


class VllmWriter:
    """vLLM's engine in a child process, started with the first block."""

    block = 512  # several times as many as run at once, so that few run alone at its end

    def __init__(self, setup: Setup):
        self.setup = setup
        self._engine: Any = None

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: int,
        temperature: float,
        ends: Sequence[int],
        seed: str,
        longest: int,
        on_step: OnStep,
    ) -> list[list[int]]:
        engine = self._started(longest)
        engine.temperature = temperature
        seeds = [number_of(f"{seed}:{row}") for row in range(len(prompts))]
        written: list[list[int]] = [[] for _ in prompts]
        finished = engine.stream(prompts, new_tokens, seeds=seeds, stop_token_ids=ends)
        for done, (row, ids) in enumerate(finished, start=1):
            written[row] = ids
            on_step(done / len(prompts), len(ids))
        return written

    def record(self) -> dict[str, Any]:
        from serving.runtime import vllm_package

        name, version = vllm_package() or ("vllm", "")
        return {
            "with": f"{name} {version}",
            "dtype": self.setup.dtype,
            "block": self.block,
            "enforce_eager": self.setup.config.enforce_eager,
        }

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def _started(self, longest: int) -> Any:
        """The engine for sequences of `longest` tokens; started anew where it has less room."""
        from serving.engine.engine import EngineProcess, EngineSettings

        if self._engine is not None and self._engine.settings.max_model_len < longest:
            self.close()
        if self._engine is None:
            batch = LARGEST_BATCH[self.setup.device]
            self._engine = EngineProcess(
                EngineSettings(
                    self.setup.target,
                    dtype=self.setup.dtype,
                    max_model_len=longest,
                    enforce_eager=self.setup.config.enforce_eager,
                    batch=batch,
                    cache_gib=engine_cache_gib(
                        self.setup.target, self.setup.dtype, self.setup.device, longest, batch
                    ),
                    tensor_parallel=self.setup.config.tensor_parallel,
                )
            )
        return self._engine
