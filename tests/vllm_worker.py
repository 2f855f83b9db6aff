"""Run in a process of its own: real vLLM engines, one after another, for many tests.

Importing vLLM takes longer than starting an engine for a tiny model, so that one process serves
them all: a request a line on stdin, an answer a line on stdout. See `VllmWorker` for both.
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
from serving.server.vllm_parser import make_parser, parse
from serving.swap.worker import EXTENSION
from tests.opened import engine_options, speculative_config

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would count more than the bytes below
CACHE_BYTES = 32 << 20


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


def answer(
    proposed: list[list[int]],
    target: str,
    draft: str | None,
    k: int,
    prompts: list[list[int]],
    new_tokens: int,
    first: str | None = None,
    compiled: bool = False,
    speculative: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Serve the prompts, one at a time, by an engine of their own."""
    from vllm import LLM

    gc.collect()  # the engine before
    gc.freeze()  # what stays need not be looked through whenever vLLM collects
    begins = draft if first is None else first
    drafting = None if begins is None else Path(begins)
    llm = LLM(
        model=target,
        dtype="float32",
        enforce_eager=not compiled,
        max_model_len=256,
        max_num_seqs=1,
        enable_prefix_caching=False,
        async_scheduling=False,
        disable_log_stats=False,
        kv_cache_memory_bytes=CACHE_BYTES,
        speculative_config=speculative or speculative_config(drafting, k),
        worker_extension_cls=EXTENSION,
        **engine_options(Path(target), drafting),
    )
    if first is not None:
        runs = []
        for folder in (None, draft, first):
            if folder is not None:
                llm.collective_rpc("replace_draft", args=(folder,))
            runs.append(complete(llm, proposed, prompts, new_tokens))
        return dict(zip(("first", "swapped", "back"), runs, strict=True))
    before = counters_from_engine(llm)
    runs = complete(llm, proposed, prompts, new_tokens)
    return {"runs": runs, "counters": asdict(counters_from_engine(llm) - before)}


def complete(
    llm: Any, proposed: list[list[int]], prompts: list[list[int]], new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy outputs, and what was proposed on the way."""
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    runs = []
    for prompt in prompts:
        proposed.clear()
        (output,) = llm.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
        runs.append({"output": list(output.outputs[0].token_ids), "proposed": list(proposed)})
    return runs


def answer_with_lora(
    target: str, adapter: str, prompts: list[list[int]], new_tokens: int
) -> dict[str, list[list[int]]]:
    """Greedy answers of one engine, with the adapter and without."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    gc.collect()
    gc.freeze()
    llm = LLM(
        model=target,
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=len(prompts),
        kv_cache_memory_bytes=CACHE_BYTES,
        enable_lora=True,
        max_lora_rank=8,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    answers = {}
    for name, lora in (("adapted", LoRARequest("tuned", 1, adapter)), ("base", None)):
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = llm.generate(asked, sampling, use_tqdm=False, lora_request=lora)
        answers[name] = [list(output.outputs[0].token_ids) for output in outputs]
    return answers


def parse_flags(flags: list[list[str]]) -> dict[str, Any]:
    """vLLM's own parser of flags, asked as the child of `serving.server.flags` asks it."""
    parser = make_parser()
    return {"parsed": [parse(parser, one) for one in flags]}


def bench_serve_metrics(outputs: list[dict[str, Any]], percentiles: list[int]) -> dict[str, Any]:
    """What `vllm bench serve` makes of answers that came at these times."""
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.benchmarks.serve import calculate_metrics

    answers = [RequestFuncOutput(**output) for output in outputs]
    return asdict(calculate_metrics([], answers, 1.0, None, percentiles, {})[0])


def read_configs(configs: list[str], positions: list[int]) -> dict[str, Any]:
    """The decoder layers' fields as vLLM's EAGLE-3 modules find them, and their ropes."""
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config

    read = []
    with set_current_vllm_config(VllmConfig()):
        for folder in configs:
            try:
                fields, rope = eagle3_fields(folder)
                read.append({"fields": fields, "cos_sin": rope[torch.tensor(positions)].tolist()})
            except Exception as error:  # whatever vLLM or transformers has against it
                read.append({"error": f"{type(error).__name__}: {error}"})
    return {"read": read}


def eagle3_fields(folder: str) -> tuple[dict[str, Any], Any]:
    """Attributes by our names, read as llama_eagle3 and qwen3_eagle3 do, and the rope's cache."""
    import torch
    from vllm.model_executor.layers.rotary_embedding import get_rope
    from vllm.transformers_utils import config as reading
    from vllm.transformers_utils.configs.eagle import EAGLEConfig
    from vllm.transformers_utils.configs.speculators import SpeculatorsConfig

    config: Any = reading.get_config(folder, trust_remote_code=False)
    if not isinstance(config, SpeculatorsConfig):
        config = EAGLEConfig(config, method="eagle3", model_type="eagle")
    heads = config.num_attention_heads
    qwen3 = "Eagle3Qwen3ForCausalLM" in config.architectures
    if qwen3:
        reading.set_default_rope_theta(config, default_theta=1000000)
    fields = {
        "num_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads
        if qwen3
        else getattr(config, "num_key_value_heads", heads),
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "max_positions": config.max_position_embeddings
        if qwen3
        else getattr(config, "max_position_embeddings", 8192),
        "rms_norm_eps": config.rms_norm_eps,
        "hidden_act": config.hidden_act,
        "qkv_bias": bool(getattr(config, "attention_bias", False)),
    }
    kinds = getattr(config, "layer_types", None) or [None] * fields["num_layers"]
    fields["windows"] = [
        config.sliding_window if kind == "sliding_attention" else None for kind in kinds
    ]
    rope = get_rope(
        fields["head_dim"],
        max_position=fields["max_positions"],
        rope_parameters=getattr(config, "rope_parameters", None),
        dtype=torch.float32,
    )
    return fields, rope.cos_sin_cache


def main() -> None:
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what vLLM prints goes to the log
    proposed: list[list[int]] = []
    record(proposed)
    for line in sys.stdin:
        try:
            request = json.loads(line)
            if "outputs" in request:
                result: dict[str, Any] = bench_serve_metrics(**request)
            elif "configs" in request:
                result = read_configs(**request)
            elif "flags" in request:
                result = parse_flags(**request)
            elif "adapter" in request:
                result = answer_with_lora(**request)
            else:
                result = answer(proposed, **request)
        except Exception as error:  # whatever vLLM raises is what a test wants to know
            result = {"error": f"{type(error).__name__}: {str(error).splitlines()[-1]}"}
        replies.write(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
