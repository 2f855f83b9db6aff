"""The child of `serving.engine.engine`: one vLLM `LLM`, JSON lines in, JSON lines out.

Run as `python -m serving.engine.worker PARENT_PID`. The first line holds the engine's settings.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
import zlib
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import IO, Any

from serving.runtime import PER_REQUEST
from serving.swap.worker import EXTENSION

PR_SET_PDEATHSIG = 1
POLL_SECONDS = 0.002  # between looks for files that other threads and processes write
IDLE_MEMORY_SHARE = 0.01  # of a GPU: vLLM wants this share free, the cache has its own size


def main() -> None:
    """Answer requests until the parent closes its end or dies."""
    _die_with(int(sys.argv[1]))
    replies = _claim_stdout()
    requests = _read_requests()

    def reply(message: dict[str, Any]) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        settings = requests.get()
        llm = load(settings)
        reply(describe(llm))
        while True:
            request = requests.get()
            if request["op"] in STREAMS:
                for message in STREAMS[request["op"]](llm, request):
                    reply(message)
            else:
                reply(answer(llm, settings, request))
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        reply({"error": f"{type(error).__name__}: {error}"[:500]})
        os._exit(1)  # threads of vLLM must not keep a failed engine alive


def load(settings: dict[str, Any]) -> Any:
    """The vLLM engine that the settings (see `serving.engine.engine`) describe."""
    gc.disable()  # a fifth of the time that vLLM takes to import goes into collections
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    gc.enable()

    from serving.engine.sampler import repair_cpu_generators, repair_cpu_sampler

    speculative = settings["speculative_config"]
    options: dict[str, Any] = dict(settings["options"])
    if settings["states_of"] is not None:
        options |= states_options(settings["states_of"], settings["states_folder"])
    if settings["sampling_logprobs"]:
        options["logprobs_mode"] = "processed_logprobs"
    if speculative is not None:
        options["speculative_config"] = speculative
        options["worker_extension_cls"] = EXTENSION
        if PER_REQUEST in {field.name for field in fields(EngineArgs)}:
            options[PER_REQUEST] = "summary"
        elif settings["batch"] > 1:
            raise RuntimeError("this vLLM counts no acceptance per request; use concurrency 1")
    llm = LLM(
        model=settings["target"],
        dtype=settings["dtype"],
        seed=settings["seed"],
        max_model_len=settings["max_model_len"],
        max_num_seqs=settings["batch"],
        enforce_eager=settings["enforce_eager"],
        tensor_parallel_size=settings["tensor_parallel"],
        kv_cache_memory_bytes=int(settings["cache_gib"] * 2**30),
        gpu_memory_utilization=IDLE_MEMORY_SHARE,
        enable_prefix_caching=False,  # a prompt comes once per round, and must cost the same
        disable_log_stats=False,  # request times and counters come from the statistics
        **options,
    )
    repair_cpu_generators()
    if speculative is not None:
        repair_cpu_sampler()
    return llm


def states_options(layer_ids: list[int], folder: str) -> dict[str, Any]:
    """Options of an engine whose prompts leave the states of these layers in `folder`."""
    from vllm.config import KVTransferConfig

    return {
        "speculative_config": {
            "method": "extract_hidden_states",
            "num_speculative_tokens": 1,  # as the method wants it; nothing is drafted
            "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": layer_ids}},
        },
        "kv_transfer_config": KVTransferConfig(
            kv_connector="HiddenStatesConnector",
            kv_connector_module_path="serving.engine.hidden_states",
            kv_role="kv_producer",
            kv_connector_extra_config={"folder": folder},
        ),
    }


def describe(llm: Any) -> dict[str, Any]:
    """What the engine settled on, for the provenance of its results."""
    from importlib.metadata import version

    config = llm.llm_engine.vllm_config
    speculative = config.speculative_config
    return {
        "dtype": str(config.model_config.dtype).removeprefix("torch."),
        "max_model_len": config.model_config.max_model_len,
        "method": speculative.method if speculative else None,
        "rejection_sample_method": getattr(speculative, "rejection_sample_method", None),
        "draft_sample_method": getattr(speculative, "draft_sample_method", None),
        "compilation_mode": str(config.compilation_config.mode),
        "model_runner": "V2" if getattr(config, "use_v2_model_runner", False) else "V1",
        "async_scheduling": bool(config.scheduler_config.async_scheduling),
        "attention_backend": attention_backends(config),
        "graph_sizes": graph_sizes(config.compilation_config),
        "torch": version("torch"),
    }


def attention_backends(config: Any) -> str | None:
    """The backends of the attention layers; None where they live in other processes."""
    layers = config.compilation_config.static_forward_context.values()
    backends = [layer.get_attn_backend() for layer in layers if hasattr(layer, "get_attn_backend")]
    return ", ".join(sorted({backend.get_name() for backend in backends})) or None


def graph_sizes(compilation: Any) -> list[int]:
    """For how many tokens there are CUDA graphs; none where a step is run without."""
    if not getattr(compilation.cudagraph_mode, "value", 0):  # NONE, as on every CPU
        return []
    return list(compilation.cudagraph_capture_sizes or [])


def answer(llm: Any, settings: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """The reply to one request."""
    if request["op"] == "generate":
        return generate(llm, settings, request)
    if request["op"] == "score":
        return score(llm, request)
    if request["op"] == "replace_draft":
        return replace_draft(llm, request)
    if request["op"] == "threads":
        import torch

        return {"threads": torch.get_num_threads()}
    if request["op"] == "counters":
        from serving.metrics import counters_from_engine

        return asdict(counters_from_engine(llm))
    raise ValueError(f"unknown request {request['op']!r}")


def generate(llm: Any, settings: dict[str, Any], request: dict[str, Any]) -> dict[str, Any]:
    """Complete the prompts; times are the engine core's own, on one monotonic clock."""
    from vllm import SamplingParams

    from serving.sampling import NEUTRAL

    seeds: list[int | None] = [None] * len(request["prompts"])
    if request["temperature"] > 0:
        seeds = request["seeds"] or [seed_of(settings["seed"], ids) for ids in request["prompts"]]
    sampling = [
        SamplingParams(
            temperature=request["temperature"],
            **NEUTRAL,
            seed=seed,
            max_tokens=request["max_tokens"],
            ignore_eos=request["ignore_eos"],
            logprobs=request["logprobs"],
            detokenize=False,
        )
        for seed in seeds
    ]
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    start = time.perf_counter()
    outputs, counted = complete(llm, prompts, sampling, one_by_one=settings["batch"] == 1)
    wall = time.perf_counter() - start
    rows = []
    for output, (histogram, draft_tokens) in zip(outputs, counted, strict=True):
        completion, times = output.outputs[0], output.metrics
        logprobs = completion.logprobs if request["logprobs"] is not None else None
        rows.append(
            {
                "output_ids": list(completion.token_ids),
                "scheduled": times.scheduled_ts,
                "first": times.first_token_ts,
                "last": times.last_token_ts,
                "histogram": histogram,
                "draft_tokens": draft_tokens,
                "logprobs": None if logprobs is None else [_ranked(entry) for entry in logprobs],
            }
        )
    return {"requests": rows, "wall_seconds": wall}


def stream(llm: Any, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Complete the prompts, all handed over at once, and yield each when it is finished."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from serving.sampling import NEUTRAL

    engine = llm.llm_engine
    for place, (ids, seed) in enumerate(zip(request["prompts"], request["seeds"], strict=True)):
        sampling = SamplingParams(
            temperature=request["temperature"],
            **NEUTRAL,
            seed=seed if request["temperature"] > 0 else None,
            max_tokens=request["max_tokens"],
            ignore_eos=True,
            stop_token_ids=request["stop_token_ids"],
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(str(place), {"prompt_token_ids": ids}, sampling)
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                ids = list(output.outputs[0].token_ids)
                yield {"place": int(output.request_id), "output_ids": ids}


def hidden_states(llm: Any, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Read the prompts, all handed over at once, and yield the file of each one's states."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    engine = llm.llm_engine
    once = SamplingParams(
        temperature=0.0,
        max_tokens=1,
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
    )
    for place, ids in enumerate(request["prompts"]):
        engine.add_request(str(place), {"prompt_token_ids": ids}, once)
    unwritten: list[tuple[int, Path]] = []
    read = 0
    while read < len(request["prompts"]) or unwritten:
        for output in engine.step():  # steps on when all are read: then the last are written
            read += 1
            path = Path(output.kv_transfer_params["hidden_states_path"])
            unwritten.append((int(output.request_id), path))
        for place, path in [one for one in unwritten if one[1].exists()]:
            unwritten.remove((place, path))
            yield {"place": place, "path": str(path)}
        if read == len(request["prompts"]) and unwritten:
            time.sleep(POLL_SECONDS)


STREAMS = {"stream": stream, "hidden_states": hidden_states}


def seed_of(seed: int, prompt: list[int]) -> int:
    """A seed for a prompt, the same whenever it comes."""
    return zlib.crc32(json.dumps([seed, *prompt]).encode())


def complete(
    llm: Any, prompts: list[Any], sampling: list[Any], one_by_one: bool
) -> tuple[list[Any], list[tuple[list[int] | None, int]]]:
    """vLLM's outputs, and per request its histogram of accepted lengths and its drafted tokens.

    A vLLM that does not count per request is asked one by one, and its counters are subtracted.
    """
    if llm.llm_engine.vllm_config.speculative_config is None:
        return llm.generate(prompts, sampling, use_tqdm=False), [(None, 0)] * len(prompts)
    if hasattr(llm.llm_engine.vllm_config.observability_config, PER_REQUEST):
        outputs = llm.generate(prompts, sampling, use_tqdm=False)
        metrics = [output.outputs[0].spec_decode_metrics for output in outputs]
        return outputs, [_counted(metric) for metric in metrics]
    assert one_by_one
    return _complete_one_by_one(llm, prompts, sampling)


def _counted(metrics: Any) -> tuple[list[int] | None, int]:
    return (list(metrics.histogram), metrics.num_draft_tokens) if metrics else (None, 0)


def _complete_one_by_one(
    llm: Any, prompts: list[Any], sampling: list[Any]
) -> tuple[list[Any], list[tuple[list[int] | None, int]]]:
    from serving.metrics import counters_from_engine

    outputs, counted = [], []
    for prompt, parameters in zip(prompts, sampling, strict=True):
        before = counters_from_engine(llm)
        outputs += llm.generate([prompt], parameters, use_tqdm=False)
        spent = counters_from_engine(llm) - before
        reached = [spent.drafts, *spent.accepted_per_position, 0]
        histogram = [a - b for a, b in itertools.pairwise(reached)]
        counted.append((histogram if spent.drafts else None, spent.draft_tokens))
    return outputs, counted


def score(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of the output's positions, from one prefill."""
    from vllm import SamplingParams

    from serving.sampling import NEUTRAL

    prompt, output = request["prompt"], request["output"]
    sampling = SamplingParams(
        temperature=0.0, **NEUTRAL, max_tokens=1, prompt_logprobs=request["top"], detokenize=False
    )
    text = {"prompt_token_ids": prompt + output}
    result = llm.generate([text], sampling, use_tqdm=False)[0]
    return {"logprobs": [_ranked(entry) for entry in result.prompt_logprobs[len(prompt) :]]}


def replace_draft(llm: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Put another draft into the place of the running one; `refused` says why it may not."""
    try:
        done = llm.collective_rpc("replace_draft", args=(request["folder"],))
    except Exception as error:  # a worker in a process of its own hands it on as another kind
        return {"refused": str(error)}
    return {"seconds": max(one["seconds"] for one in done)}


def _ranked(entry: Any) -> list[tuple[int, float]]:
    pairs = [(int(token), float(value.logprob)) for token, value in entry.items()]
    return sorted(pairs, key=lambda pair: -pair[1])


def _die_with(parent: int) -> None:
    """Ask Linux for SIGKILL when the parent dies, however it dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before we asked
        os._exit(1)


def _claim_stdout() -> IO[str]:
    """Keep the real stdout for replies; whatever else prints there goes to the log."""
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return replies


def _read_requests() -> queue.Queue[dict[str, Any]]:
    """Read lines in a thread of its own, so that the pipe's end is noticed while vLLM works."""
    requests: queue.Queue[dict[str, Any]] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            requests.put(json.loads(line))
        os.killpg(os.getpid(), signal.SIGKILL)  # the group that the parent made for us

    threading.Thread(target=read, daemon=True).start()
    return requests


if __name__ == "__main__":
    main()
