"""Run in a process of its own: print what vLLM's own drafter proposes, step by step, as JSON."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

from serving.speculation import engine_options, speculative_config

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


def record(proposed: list[list[int]]) -> None:
    """Have vLLM's drafters append what they propose for the first request to `proposed`."""
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer
    from vllm.v1.spec_decode.medusa import MedusaProposer

    for drafter in (SpecDecodeBaseProposer, MedusaProposer):
        original = drafter.propose

        def recording(self: Any, *args: Any, original: Any = original, **kwargs: Any) -> Any:
            tokens = original(self, *args, **kwargs)
            proposed.append(tokens[0].tolist())
            return tokens

        drafter.propose = recording


def main(target: str, draft: str, ks: list[int], prompts: list[list[int]], new_tokens: int) -> None:
    from vllm import LLM, SamplingParams

    proposed: list[list[int]] = []
    record(proposed)
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    results = []
    for k in ks:
        llm = LLM(
            model=target,
            dtype="float32",
            enforce_eager=True,
            max_model_len=256,
            max_num_seqs=1,
            enable_prefix_caching=False,
            async_scheduling=False,
            speculative_config=speculative_config(Path(draft), k),
            **engine_options(Path(draft)),
        )
        runs = []
        for prompt in prompts:
            proposed.clear()
            (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
            runs.append({"output": list(output.outputs[0].token_ids), "proposed": list(proposed)})
        results.append(runs)
        del llm
        gc.collect()
    print("RESULTS " + json.dumps(results))


if __name__ == "__main__":
    main(**json.loads(sys.stdin.read()))
