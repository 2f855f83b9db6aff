"""The test's end of `tests.vllm_worker`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


class VllmWorker:
    """A process that serves one tiny model after another with vLLM, in float32."""

    def __init__(self, log: Path):
        self.log = log
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.vllm_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log.open("w"),
            text=True,
        )

    def serve(
        self,
        target: Path,
        draft: Path | None,
        k: int,
        prompts: list[list[int]],
        new_tokens: int,
        speculative: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Greedy outputs, with a draft or without; `speculative` is vLLM's own setting, in place of
        a draft that we read.

        `runs` has for each prompt its `output` and what the drafter `proposed`, step by step;
        `counters` are vLLM's own. Where vLLM refuses, there is only `error`.
        """
        request: dict[str, Any] = {"target": str(target), "draft": draft and str(draft), "k": k}
        request |= {"prompts": prompts, "new_tokens": new_tokens, "speculative": speculative}
        return self._ask(request)

    def swap(
        self,
        target: Path,
        first: Path,
        draft: Path,
        k: int,
        prompts: list[list[int]],
        new_tokens: int,
        *,
        compiled: bool = False,
    ) -> dict[str, Any]:
        """Greedy runs of one engine: with `first`, with `draft` in its place, and back again.

        They are called `first`, `swapped` and `back`.
        """
        request = {"target": str(target), "draft": str(draft), "first": str(first), "k": k}
        rest = {"prompts": prompts, "new_tokens": new_tokens, "compiled": compiled}
        return self._ask(request | rest)

    def serve_lora(
        self, target: Path, adapter: Path, prompts: list[list[int]], new_tokens: int
    ) -> dict[str, Any]:
        """Greedy answers `adapted` with a LoRA adapter and `base` without, by the same engine."""
        request = {"target": str(target), "adapter": str(adapter)}
        return self._ask(request | {"prompts": prompts, "new_tokens": new_tokens})

    def parse_flags(self, lines: list[list[str]]) -> list[dict[str, Any]]:
        """What vLLM's own parser makes of each of these lists of flags for its server."""
        parsed: list[dict[str, Any]] = self._ask({"flags": lines})["parsed"]
        return parsed

    def bench_serve_metrics(
        self, outputs: list[dict[str, Any]], percentiles: list[int]
    ) -> dict[str, Any]:
        """vLLM's `BenchmarkMetrics`; `outputs` are the arguments of its `RequestFuncOutput`."""
        return self._ask({"outputs": outputs, "percentiles": percentiles})

    def read_configs(self, folders: list[Path], positions: list[int]) -> list[dict[str, Any]]:
        """What vLLM makes of EAGLE-3 configs: the layers' `fields`, and `cos_sin` at positions.

        Where it refuses one, there is only `error`.
        """
        request = {"configs": [str(folder) for folder in folders], "positions": positions}
        read: list[dict[str, Any]] = self._ask(request)["read"]
        return read

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the vLLM worker has died: {self.log.read_text()[-4000:]}"
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
