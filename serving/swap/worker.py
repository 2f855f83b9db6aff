"""vLLM's end of a swap: methods that join its worker (`--worker-extension-cls`, an official way).

vLLM's own loader makes a second draft model from the new folder, with all that it derives from
weights (packed matrices, fused projections, what is shared with the target), and every value of it
is copied into the first one. What refers to the first one stays right: compiled code, CUDA graphs,
the cache's layers. vLLM's layerwise reload derives some of these while weights are still missing
(DFlash's fused projections on a CPU), and its CPU matrices go on in compiled code that holds the
old ones.
"""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FunctionType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

EXTENSION = "serving.swap.worker.DraftSwap"
OWN = {"kv_cache"}  # what a layer's memory holds, not its weights
HANDLER = "handler_tensor"  # where vLLM's packed CPU matrices keep the address of theirs


class DraftSwap:
    """Joins vLLM's worker, one a device; a method runs between two steps, on all of them."""

    model_runner: Any
    vllm_config: Any

    def replace_draft(self, folder: str) -> dict[str, float]:
        """Load the draft of `folder` into the running one, which it must equal but for its values.

        Returns `seconds` and the `bytes` that changed hands. Raises `ValueError` before anything is
        changed where the new one cannot be loaded or is of another build; the old one goes on then.
        """
        import torch
        from vllm.config import set_current_vllm_config

        began = time.perf_counter()
        runner = self.model_runner
        with torch.inference_mode(), set_current_vllm_config(self.vllm_config):
            try:
                twin = loaded_beside(runner, self.vllm_config, folder)
                pairs = value_pairs(draft_of(runner), twin, set(runner.get_model().modules()))
            except Exception as error:  # whatever vLLM's loader has against it; nothing is changed
                raise ValueError(f"{type(error).__name__}: {error}") from error
            for old, new in pairs:
                move(old, new)
            if torch.accelerator.is_available():
                torch.accelerator.synchronize()
        moved = sum(new.nbytes for _, new in pairs if isinstance(new, torch.Tensor))
        return {"seconds": time.perf_counter() - began, "bytes": moved}


def proposer_of(runner: Any) -> Any:
    """What drafts in this runner: vLLM's first one calls it a drafter, the second a speculator."""
    return getattr(runner, "drafter", None) or runner.speculator


def draft_of(runner: Any) -> nn.Module:
    """The running draft model, out of the wrapper that records CUDA graphs."""
    model = proposer_of(runner).model
    unwrap = getattr(model, "unwrap", None)
    found: nn.Module = unwrap() if callable(unwrap) else model
    return found


def loaded_beside(runner: Any, vllm_config: Any, folder: str) -> nn.Module:
    """A second draft model, loaded by the runner's own way, that nothing else knows of.

    Further loads (of a swap that fails) come from the old folder again.
    """
    beside = copy.copy(proposer_of(runner))
    source = vllm_config.speculative_config.draft_model_config
    layers = vllm_config.compilation_config.static_forward_context
    mine = {id(module) for module in draft_of(runner).modules()}
    targets = {name: layer for name, layer in layers.items() if id(layer) not in mine}
    with exchanged(layers, targets), other_folder(source, folder), quick_collections():
        beside.load_model(runner.get_model())
    model = beside.model
    unwrap = getattr(model, "unwrap", None)
    return unwrap() if callable(unwrap) else model


@contextmanager
def exchanged(table: dict[str, Any], other: dict[str, Any]) -> Iterator[None]:
    """For a while, `table` has the entries of `other`: layers enlist there, under one name each."""
    before = dict(table)
    table.clear()
    table.update(other)
    try:
        yield
    finally:
        table.clear()
        table.update(before)


@contextmanager
def other_folder(config: Any, folder: str) -> Iterator[None]:
    """For a while, the draft's config names another folder."""
    before = config.model
    config.model = folder
    try:
        yield
    finally:
        config.model = before


@contextmanager
def quick_collections() -> Iterator[None]:
    """For a while, Python collects only what is new: vLLM's loader collects twice, which takes more
    than a second in its worker, and all requests wait meanwhile."""
    frozen = gc.get_freeze_count()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()


def value_pairs(old: nn.Module, new: nn.Module, target: set[nn.Module]) -> list[tuple[Any, Any]]:
    """Each holder of values in the running draft, with the one of the same place in the new one.

    Raises `ValueError` where the two are not built alike. What both share with the target is left
    out.
    """
    pairs: list[tuple[Any, Any]] = []
    ours, theirs = (dict(m.named_modules(remove_duplicate=False)) for m in (old, new))
    if ours.keys() != theirs.keys():
        raise ValueError(f"other modules: {sorted(ours.keys() ^ theirs.keys())[:5]}")
    for name, a in ours.items():
        b = theirs[name]
        if a is b:
            continue
        if type(a) is not type(b):
            raise ValueError(f"{name} is a {type(b).__name__}, not a {type(a).__name__}")
        if a in target:
            raise ValueError(f"{name} is the target's in the running draft, but not in the new one")
        for key, value in holders(a):
            pairs += paired(value, dict(holders(b)).get(key), f"{name}.{key}")
    return pairs


def holders(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Parameters, buffers, and what a module keeps beside them, by name."""
    for table in (module._parameters, module._buffers, vars(module)):
        for key, value in table.items():
            if key not in OWN and value is not None:
                yield key, value


def paired(a: Any, b: Any, where: str) -> list[tuple[Any, Any]]:
    """The tensors (and packed matrices) in `a`, each with that of the same place in `b`."""
    import torch

    if isinstance(a, torch.Tensor):
        if not isinstance(b, torch.Tensor) or (a.shape, a.dtype) != (b.shape, b.dtype):
            found = f"{list(b.shape)} {b.dtype}" if isinstance(b, torch.Tensor) else b
            raise ValueError(f"{where} is {found}, not {list(a.shape)} {a.dtype}")
        return [(a, b)] if a.numel() and a is not b else []
    if hasattr(a, HANDLER):
        if (a.k, a.n) != (b.k, b.n):
            raise ValueError(f"{where} is {b.k} x {b.n}, not {a.k} x {a.n}")
        return [(a, b)]
    if isinstance(a, list | tuple) and type(a) is type(b) and len(a) == len(b):
        return [pair for i, v in enumerate(a) for pair in paired(v, b[i], f"{where}[{i}]")]
    if isinstance(a, FunctionType) and a.__closure__:
        mine = [cell.cell_contents for cell in a.__closure__]
        if not isinstance(b, FunctionType) or a.__code__ is not b.__code__:
            if any(isinstance(value, torch.Tensor) or hasattr(value, HANDLER) for value in mine):
                raise ValueError(f"{where} computes in another way")
            return []
        return paired(mine, [cell.cell_contents for cell in b.__closure__ or ()], where)
    return []


def move(old: Tensor | Any, new: Tensor | Any) -> None:
    """Values of `new` into `old`, in place."""
    if hasattr(old, HANDLER):
        # Each frees what its tensor points to, so the two exchange their matrices.
        a, b = getattr(old, HANDLER), getattr(new, HANDLER)
        kept = a.clone()
        a.copy_(b)
        b.copy_(kept)
    else:
        old.copy_(new)
