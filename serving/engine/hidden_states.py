"""vLLM's end of `EngineProcess.hidden_states`: a connector that writes each prompt's states to a
file.

vLLM's method `extract_hidden_states` keeps the states in a cache group of their own, and leaves it
to a connector to take them out. Its example connector does so on CUDA streams; this one copies from
whatever device the cache lies on. Named by `kv_connector_module_path`, it is imported by vLLM, and
by nothing of ours.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector import (
    extract_from_kv_cache,
)
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.extract_hidden_states import CacheOnlyAttentionLayer
from vllm.v1.kv_cache_interface import HiddenStateCacheSpec

WRITERS = 4  # threads that write files while the next prompts run


@dataclass
class Finished:
    """A prompt whose states are complete: `tokens` of them, in these blocks of the cache."""

    request: str
    tokens: int
    blocks: list[int]


@dataclass
class FinishedPrompts(KVConnectorMetadata):
    """What the scheduler's side tells the worker's with each step."""

    prompts: list[Finished] = field(default_factory=list)


class HiddenStatesConnector(KVConnectorBase_V1, SupportsHMA):
    """Writes `hidden_states` [n, layers, d] of each prompt to REQUEST.safetensors in `folder`.

    A file appears whole. The scheduler keeps a finished prompt's blocks until they are copied.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: Any):
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._folder = Path(self._kv_transfer_config.get_from_extra_config("folder", ""))
        specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
        own = [i for i, spec in enumerate(specs) if isinstance(spec, HiddenStateCacheSpec)]
        self._group = own[0] if own else 0
        self._block_size = specs[self._group].block_size
        # The scheduler's side.
        self._finished: list[Finished] = []
        # The worker's side.
        self._cache: Tensor | None = None
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="hidden-states")
        self._writing: list[Future[None]] = []

    # The scheduler's side.

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        return 0, False  # nothing is read from elsewhere

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        pass

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        if self._group >= len(block_ids):  # ended before it ran
            return False, None
        return self.request_finished(request, block_ids[self._group])

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        tokens = len(request.prompt_token_ids or ())
        self._finished.append(Finished(request.request_id, tokens, list(block_ids)))
        path = str(self._path(request.request_id))
        return True, {"hidden_states_path": path}

    def build_connector_meta(self, scheduler_output: Any) -> FinishedPrompts:
        finished, self._finished = self._finished, []
        return FinishedPrompts(finished)

    def get_finished_count(self) -> int:
        return 1  # of tensor-parallel workers the first alone writes

    # The worker's side.

    def register_kv_caches(self, kv_caches: dict[str, Tensor]) -> None:
        own = get_layers_from_vllm_config(
            self._vllm_config, CacheOnlyAttentionLayer, list(kv_caches)
        )
        (name,) = own
        self._cache = kv_caches[name]

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        pass

    def wait_for_layer_load(self, layer_name: str) -> None:
        pass

    def save_kv_layer(
        self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any
    ) -> None:
        pass

    def wait_for_save(self) -> None:
        pass

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Copy the states of the prompts that have ended; their blocks may be used again."""
        metadata = self._get_connector_metadata() if self.has_connector_metadata() else None
        if not isinstance(metadata, FinishedPrompts) or get_tensor_model_parallel_rank() != 0:
            return None, None
        for write in [one for one in self._writing if one.done()]:
            self._writing.remove(write)
            write.result()  # raises what it raised
        for prompt in metadata.prompts:
            states = self._taken(prompt)
            self._writing.append(self._pool.submit(self._write, prompt.request, states))
        return {prompt.request for prompt in metadata.prompts} or None, None

    def _taken(self, prompt: Finished) -> Tensor:
        """The prompt's states [n, layers, d] on the CPU.

        Its blocks are set to zero behind it: states that vLLM did not write are then all zero.
        """
        cache = self._cache
        assert cache is not None
        blocks = torch.tensor(prompt.blocks, dtype=torch.long)
        places = torch.arange(self._block_size)
        slots = (blocks[:, None] * self._block_size + places).flatten().to(cache.device)
        states = extract_from_kv_cache(cache, slots, prompt.tokens).to("cpu", copy=True)
        cache[blocks.to(cache.device)] = 0
        return states

    def _path(self, request: str) -> Path:
        return self._folder / f"{request}.safetensors"

    def _write(self, request: str, states: Tensor) -> None:
        path = self._path(request)
        partial = path.with_suffix(".partial")
        save_file({"hidden_states": states.contiguous()}, partial)
        os.replace(partial, path)
