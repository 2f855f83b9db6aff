"""Merge a finished adapter into its base draft: a plain checkpoint in the base's own format.

Every tensor that was not trained keeps its bytes. The merged forward is measured against the
adapter's on random features, and the differences are recorded in `afaspec.json`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora.layer import Linear as LoraLinear
from safetensors.torch import load_file
from torch import Tensor, nn

from afaspec.adapters.afa import read_record
from afaspec.adapters.annealing import refuse_non_linear
from afaspec.capture.adapted_target import open_target
from afaspec.pairs.names import open_draft
from afaspec.train.record import training_summary
from afaspec.versions import versions
from bench.prompts.trained_on import read_roots, write_roots
from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.source import load_tensor, open_source
from drafts.errors import UserError
from drafts.files import (
    atomic_folder,
    read_json,
    remove_leftovers,
    require_empty,
    write_json,
)
from drafts.hashes import hash_file
from drafts.nn.interface import Draft
from drafts.nn.packing import Packing
from drafts.registry import load_draft, module_names, read_draft, write_like
from drafts.target.info import TargetInfo
from drafts.tensors import read_header

ROUNDINGS = 8.0  # that a merge may cost where one costs more than usual
TOLERANCE = 1e-5  # relative, of a merge in float32, whatever rounding does


@dataclass(frozen=True)
class Parity:
    """Largest differences of normed outputs, relative to the largest output."""

    float32: float  # merged in float32 against the adapter
    rounding: float  # merged in float32 against the same with its weights rounded otherwise
    stored: float  # as written (rounded to the base's dtype) against the adapter
    dtype: str
    untouched_tensors: int  # byte-identical to the base's
    changed_tensors: int


def merge(trained: Path, base: DraftInfo, out: Path, target: TargetInfo | None = None) -> Parity:
    """Merge the run or adapter in `trained` into `base` and write the draft to `out`.

    Raises `UserError` for beta > 0, for an adapter of another draft, and where merging would lose
    precision beyond rounding.
    """
    result, run = find_result(trained)
    record = read_record(result)
    refuse_non_linear(record.beta, where=result)
    check_base(base, run, result)
    check_finite(result)
    if out.resolve() == base.folder.resolve():
        raise UserError("is the base draft itself", where=out, hint="choose another --out")
    remove_leftovers(out)
    check_replaceable(out)

    draft = load_draft(base, target)
    before = {name: p.detach().clone() for name, p in draft.named_parameters()}
    adapted = load_result(draft, result)
    merged = merged_weights(adapted)
    changed = {
        n: w for n, w in merged.items() if n in base.to_store or not torch.equal(w, before[n])
    }
    check_merged(changed, base, result)

    with atomic_folder(out) as folder:
        write_like(base, folder, changed)
        parity = measure_parity(adapted, base, read_draft(folder), changed, target)
        # Adapter and merge differ by float32 rounding, of which a draft makes more or less.
        tolerance = max(TOLERANCE, ROUNDINGS * parity.rounding)
        if not (parity.float32 <= tolerance and math.isfinite(parity.stored)):  # NaN is no parity
            raise UserError(
                f"the merged draft differs from the adapter by {parity.float32:.2e} relative "
                f"in float32 ({parity.stored:.2e} as stored), more than {tolerance:.0e}",
                where=result,
                hint="check the adapter for very large weights, or train it again at a lower rate",
            )
        write_json(
            folder / "afaspec.json",
            {
                "made_by": "afaspec merge",
                "base_sha256": base.sha256,
                "adapter_sha256": {
                    p.name: hash_file(p) for p in sorted(result.glob("*.safetensors"))
                },
                "training": training_summary(run) if run else None,
                "annealing": asdict(record),
                "parity": asdict(parity),
                "versions": versions(),
            },
        )
        write_roots(folder, read_roots(run or result) | read_roots(base.folder))
    return parity


def check_replaceable(out: Path) -> None:
    """Raise `UserError` where `out` holds anything but a draft that was merged before."""
    record = out / "afaspec.json"
    merged = record.is_file() and read_json(record).get("made_by") == "afaspec merge"
    if not merged:
        require_empty(out)


def find_result(trained: Path) -> tuple[Path, Path | None]:
    """The folder of trained weights, and the run it belongs to (None for a bare adapter)."""
    for folder in (trained / "adapter", trained / "weights", trained):
        remove_leftovers(folder)
        for name in ("adapter_model.safetensors", "weights.safetensors"):
            if (folder / name).exists():
                read_header(folder / name)
                in_a_run = folder != trained or (folder.parent / "config.json").exists()
                return folder, folder.parent if in_a_run else None
    raise UserError(
        "holds neither an adapter nor trained weights",
        where=trained,
        hint="give the --out folder of `afaspec train`, after its annealing has ended",
    )


def recorded_draft(trained: Path) -> DraftInfo:
    """The base draft that the run's configuration or a bare PEFT adapter names."""
    result, run = find_result(trained)
    if run is not None and (run / "config.json").exists():
        return open_draft(read_json(run / "config.json")["draft"])
    config = result / "adapter_config.json"
    named = read_json(config).get("base_model_name_or_path") if config.exists() else None
    if not named:
        raise UserError("does not say which draft it adapts", where=result, hint="give --draft DIR")
    return open_draft(named)


def recorded_target(trained: Path) -> TargetInfo | None:
    """The run's target: its configuration's, else its feature store's; None where none is named."""
    _, run = find_result(trained)
    if run is None or not (run / "config.json").exists():
        return None
    config = read_json(run / "config.json")
    if config.get("target"):
        return open_target(config["target"], config.get("target_adapter"))
    manifest = Path(config["store"]) / "manifest.json"
    return open_target(read_json(manifest)["target"]["path"]) if manifest.exists() else None


def check_base(base: DraftInfo, run: Path | None, result: Path) -> None:
    """The base draft is the one that was adapted."""
    manifest = run / "manifest.json" if run else None
    if manifest and manifest.exists():
        expected = read_json(manifest)["draft_sha256"]
        if base.sha256 != expected:
            raise UserError(
                "is not the draft that was adapted (its hash differs)",
                where=base.folder,
                hint="give the base draft of the run, unchanged",
            )
    names, headers = module_names(base), open_source(base.folder).headers
    shapes = {names[stored]: header.shape for stored, header in headers.items()}
    for name, header in read_header(next(result.glob("*.safetensors"))).items():
        if name.endswith(("lora_A.weight", "lora_B.weight")):
            plain = name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] + ".weight"
            dim, axis = (header.shape[1], 1) if "lora_A" in name else (header.shape[0], 0)
            fits = plain in shapes and shapes[plain][axis] == dim
        else:
            fits = shapes.get(name) == header.shape
        if not fits:
            raise UserError(
                f"was trained for another draft: {name} {list(header.shape)} does not fit "
                f"{base.folder}",
                where=result,
                hint="give the base draft of the run",
            )


def check_finite(result: Path) -> None:
    """Raise `UserError` for the first trained tensor that holds a NaN or an infinity."""
    for name, tensor in load_file(next(result.glob("*.safetensors"))).items():
        if wrong := int((~tensor.isfinite()).sum()):
            raise UserError(
                f"{name} has {wrong} of {tensor.numel():,} values that are NaN or infinite",
                where=result,
                hint="train again, at a lower --learning-rate",
            )


def check_merged(weights: dict[str, Tensor], base: DraftInfo, result: Path) -> None:
    """Raise `UserError` for a merged weight that the base's type cannot hold, by module names."""
    headers, own = open_source(base.folder).headers, module_names(base)
    types = {own[n]: getattr(torch, headers[n].dtype) for n in own if own[n] in weights}
    for name, weight in weights.items():
        dtype = types.get(name, weight.dtype)
        if not weight.to(dtype).float().isfinite().all():
            raise UserError(
                f"{name} would be NaN or infinite in {str(dtype).removeprefix('torch.')}",
                where=result,
                hint="train again, at a lower --learning-rate or with a smaller --alpha",
            )


def load_result(draft: Draft, result: Path) -> nn.Module:
    """The draft as it was trained: with its adapter attached, or its weights replaced."""
    if (result / "weights.safetensors").exists():
        draft.load_state_dict(load_file(result / "weights.safetensors"), strict=False)
        return draft.eval()
    return PeftModel.from_pretrained(draft, str(result)).base_model.model.eval()


def merged_weights(adapted: nn.Module) -> dict[str, Tensor]:
    """Plain float32 parameters by the draft's own names; W0 + s B A where there is an adapter."""
    weights: dict[str, Tensor] = {}
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLinear):
            weight = module.base_layer.weight.detach().float()
            for adapter in module.active_adapters:
                weight = weight + module.get_delta_weight(adapter).detach().float()
            weights[f"{name}.weight"] = weight
    for name, parameter in adapted.named_parameters():
        if ".lora_" not in name and ".base_layer." not in name:
            weights[name] = parameter.detach()
    return weights


def load_merged(base: DraftInfo, result: Path, target: TargetInfo | None) -> Draft:
    """What `merge` would write and `load_draft` read: merged weights, rounded to the base's types.

    Raises `UserError` for an adapter that is not linear yet.
    """
    refuse_non_linear(read_record(result).beta, where=result)
    check_finite(result)
    weights = merged_weights(load_result(load_draft(base, target), result))
    check_merged(weights, base, result)
    merged = load_draft(base, target).eval()
    headers = open_source(base.folder).headers
    for name, own in module_names(base).items():
        if own in weights:
            weights[own] = weights[own].to(getattr(torch, headers[name].dtype))
    merged.load_state_dict({n: w.float() for n, w in weights.items()}, strict=False)
    return merged


def rounded(draft: Draft, changed: dict[str, Tensor], draws: int = 4) -> Iterator[Draft]:
    """The draft with the `changed` weights rounded otherwise, by chance, a few times.

    Each moves by one float32 unit in its last place at most. What that does to the outputs says how
    much of a difference is rounding: it depends on the draft and, for the largest, on luck.
    """
    generator = torch.Generator().manual_seed(0)
    parameters = dict(draft.named_parameters())
    for _ in range(draws):
        for name, weight in changed.items():
            noise = torch.rand(weight.shape, generator=generator, dtype=torch.float64) - 0.5
            parameters[name].copy_(weight * (1 + torch.finfo(torch.float32).eps * noise))
        yield draft


@torch.no_grad()
def measure_parity(
    adapted: nn.Module,
    base: DraftInfo,
    written: DraftInfo,
    changed: dict[str, Tensor],
    target: TargetInfo | None,
) -> Parity:
    """Run adapter, float32 merge and the written checkpoint on the same random input."""
    merged = load_draft(base, target).eval()
    merged.load_state_dict(changed, strict=False)
    stored = load_draft(written, target).eval()
    steps = min(3, base.max_k or 3)
    generator = torch.Generator().manual_seed(0)
    packing = Packing.within([48, 48], [torch.arange(40)] * 2)
    features = torch.randn(len(packing), merged.feature_size, generator=generator)
    ids = torch.randint(base.vocab_size, (len(packing),), generator=generator)

    def outputs(draft: Any) -> Tensor:
        drafted = draft(features, ids, steps, packing)
        return torch.stack([draft.logits(rows, j) for j, rows in enumerate(drafted)])

    reference = outputs(adapted)
    peak = reference.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    exact = outputs(merged)
    rounding = max(float((outputs(m) - exact).abs().max()) for m in rounded(merged, changed))
    names = module_names(base)
    old, new = open_source(base.folder), open_source(written.folder)
    same = sum(
        torch.equal(load_tensor(old, n), load_tensor(new, n))
        for n in old.headers
        if names[n] not in changed and n not in old.scales
    )
    return Parity(
        float32=float((exact - reference).abs().max() / peak),
        rounding=rounding / float(peak),
        stored=float((outputs(stored) - reference).abs().max() / peak),
        dtype=base.dtype,
        untouched_tensors=same,
        changed_tensors=len(changed),
    )
