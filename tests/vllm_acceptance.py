"""Run in a process of its own: serve one target with several drafts, print acceptance as JSON.

A draft that vLLM refuses has the last line of its error in place of figures.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from serving.metrics import counters_from_engine
from serving.speculation import speculative_config

os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}


def served(
    target: str, draft: str, k: int, prompts: list[list[int]], new_tokens: int
) -> dict[str, Any]:
    """Outputs and acceptance counters of one engine."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=target,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        enable_prefix_caching=False,
        disable_log_stats=False,
        speculative_config=speculative_config(Path(draft), k),
    )
    before = counters_from_engine(llm)
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    texts = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = llm.generate(texts, sampling, use_tqdm=False)
    counters = counters_from_engine(llm) - before
    return {"outputs": [list(o.outputs[0].token_ids) for o in outputs], **asdict(counters)}


def main(
    target: str, drafts: dict[str, str], k: int, prompts: list[list[int]], new_tokens: int
) -> None:
    results: dict[str, Any] = {}
    for name, draft in drafts.items():
        try:
            results[name] = served(target, draft, k, prompts, new_tokens)
        except Exception as error:  # whatever vLLM raises is what this is to find out
            results[name] = {"error": f"{type(error).__name__}: {str(error).splitlines()[-1]}"}
        gc.collect()
    print("RESULTS " + json.dumps(results))


if __name__ == "__main__":
    main(**json.loads(sys.stdin.read()))
