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
        self, target: Path, draft: Path, k: int, prompts: list[list[int]], new_tokens: int
    ) -> dict[str, Any]:
        """Greedy outputs with a draft.

        `runs` has for each prompt its `output` and what the drafter `proposed`, step by step;
        `counters` are vLLM's own. Where vLLM refuses, there is only `error`.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        request = {"target": str(target), "draft": str(draft), "k": k}
        request |= {"prompts": prompts, "new_tokens": new_tokens}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, f"the vLLM worker has died: {self.log.read_text()[-4000:]}"
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
