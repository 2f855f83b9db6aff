"""Run in a process of its own: print what vLLM's own drafter proposes, step by step, as JSON."""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


def main(target: str, draft: str, k: int, prompts: list[list[int]], new_tokens: int) -> None:
    from vllm import LLM, SamplingParams
    from vllm.v1.spec_decode.llm_base_proposer import SpecDecodeBaseProposer

    proposed: list[list[int]] = []
    original = SpecDecodeBaseProposer.propose

    def recording(self: Any, *args: Any, **kwargs: Any) -> Any:
        tokens = original(self, *args, **kwargs)
        proposed.append(tokens[0].tolist())
        return tokens

    SpecDecodeBaseProposer.propose = recording
    llm = LLM(
        model=target,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=1,
        enable_prefix_caching=False,
        async_scheduling=False,
        speculative_config={"method": "eagle3", "model": draft, "num_speculative_tokens": k},
    )
    results = []
    for prompt in prompts:
        proposed.clear()
        sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
        (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        results.append({"output": list(output.outputs[0].token_ids), "proposed": list(proposed)})
    print("RESULTS " + json.dumps(results))


if __name__ == "__main__":
    request = json.loads(sys.stdin.read())
    main(**request)
