"""What commands do at their door, for tests that have folders: open them, then call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from afaspec.capture import plan as planning
from afaspec.capture import run as capturing
from afaspec.capture.adapted_target import open_target
from afaspec.capture.config import CaptureConfig
from afaspec.capture.parts import run as parts
from afaspec.checkpoints import init, inspect
from afaspec.checkpoints import merge as merging
from afaspec.checkpoints.config import InitConfig
from afaspec.cli.adapt.compare import open_models
from afaspec.cli.adapt.train import open_inputs
from afaspec.compare import run as studies
from afaspec.compare.config import CompareConfig
from afaspec.pairs.names import open_draft
from afaspec.store.read import FeatureStore
from afaspec.train import run as training
from afaspec.train.config import TrainConfig
from bench.records.arms import Arm
from drafts import convert as conversion
from drafts import registry
from drafts.checkpoint import shared
from drafts.checkpoint.family import InitOptions
from drafts.checkpoint.info import DraftInfo
from drafts.nn.interface import Draft
from drafts.registry import read_draft
from drafts.target import head, weights
from drafts.target.info import TargetInfo, read_target
from serving import compatibility, speculation


def load_draft(draft: Path, of: Path | None = None) -> Draft:
    return registry.load_draft(read_draft(draft), _target(of))


def init_draft(family: str, of: Path, options: InitOptions | None = None) -> Draft:
    return registry.init_draft(family, read_target(of), options)


def write_like(base: Path, folder: Path, changed: dict[str, Any]) -> None:
    registry.write_like(read_draft(base), folder, changed)


def convert(draft: Path, layout: str, out: Path, of: Path | None = None) -> DraftInfo:
    return conversion.convert(read_draft(draft), layout, out, _target(of))


def load_embedding(of: Path) -> Any:
    return weights.load_embedding(read_target(of))


def load_lm_head(of: Path) -> Any:
    return head.load_lm_head(read_target(of))


def load_target_head(of: Path) -> Any:
    return head.load_target_head(read_target(of))


def take_from_target(draft: Draft, of: Path, kept: Any) -> None:
    shared.take_from_target(draft, read_target(of), kept)


def compare(of: Path, draft: Path) -> list[compatibility.Check]:
    return compatibility.compare(read_target(of), read_draft(draft))


def require_compatible(of: Path, draft: Path) -> list[compatibility.Check]:
    return compatibility.require_compatible(read_target(of), read_draft(draft))


def speculative_config(
    draft: Path | Literal["ngram"] | None, k: int, **options: Any
) -> dict[str, Any] | None:
    return speculation.speculative_config(drafter(draft), k, **options)


def engine_options(of: Path, draft: Path | Literal["ngram"] | None) -> dict[str, bool]:
    return speculation.engine_options(read_target(of), drafter(draft))


def no_target_at(folder: Path) -> TargetInfo:
    """What an opened target looks like, where nothing reads its files."""
    target = TargetInfo(
        folder=folder, model_type="llama", hidden_size=8, vocab_size=16, num_layers=4,
        max_positions=64, dtype="bfloat16", rope={}, config={},
    )  # fmt: skip
    vars(target)["sha256"] = "0" * 64
    return target


def resolve_target(
    of: Path, adapter: Path | None, note: Callable[[str], object] = lambda text: None
) -> Path:
    return open_target(of, adapter, note).folder


def capture(
    config: CaptureConfig,
    on_progress: Callable[[capturing.CaptureProgress], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> FeatureStore:
    return capturing.capture(config, *_models(config, note), on_progress, note)


def capture_in_parts(
    config: CaptureConfig,
    on_progress: Callable[[capturing.CaptureProgress], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> FeatureStore:
    return parts.capture_in_parts(config, *_models(config, note), on_progress, note)


def plan_capture(config: CaptureConfig, note: Callable[[str], None]) -> planning.CapturePlan:
    return planning.plan_capture(planning.settle(config, *_models(config, note)), note)


def train(config: TrainConfig, *rest: Any, **options: Any) -> training.Trained:
    return training.train(config, *open_inputs(config), *rest, **options)


def merge(trained: Path, base: Path | None, out: Path, of: Path | None = None) -> merging.Parity:
    draft = merging.recorded_draft(trained) if base is None else open_draft(base)
    return merging.merge(trained, draft, out, _target(of) or merging.recorded_target(trained))


def inspect_draft(draft: Path, of: Path | None = None) -> inspect.Inspection:
    return inspect.inspect_draft(read_draft(draft), _target(of))


def init_checkpoint(config: InitConfig, note: Callable[[str], None] = print) -> DraftInfo:
    stores = [FeatureStore.open(folder) for folder in config.store or []]
    return init.init_checkpoint(config, open_target(config.target), stores, note)


def compare_arms(config: CompareConfig, *rest: Any, **options: Any) -> dict[str, Any]:
    return studies.compare(config, *open_models(config), *rest, **options)


def forecast(config: CompareConfig) -> studies.Forecast:
    return studies.forecast(config, *open_models(config))


def arm(name: str, draft: Path | Literal["ngram"] | None = None) -> Arm:
    return Arm(name, drafter(draft))


def no_draft_at(folder: Path) -> DraftInfo:
    """What an opened draft looks like, where nothing reads its files."""
    draft = DraftInfo(
        folder=folder, family="eagle3", format="eagle", method="eagle3", hidden_size=8,
        target_hidden_size=8, vocab_size=16, draft_vocab_size=16, layer_ids=(1, 2, 3),
        max_positions=64, rope=None, dtype="bfloat16", shared=(), config={},
    )  # fmt: skip
    vars(draft)["sha256"] = "0" * 64
    return draft


def _models(
    config: CaptureConfig, note: Callable[[str], None] | None
) -> tuple[TargetInfo, DraftInfo | None]:
    target = open_target(config.target, config.target_adapter, note or (lambda text: None))
    return target, open_draft(config.draft) if config.draft else None


def _target(of: Path | None) -> TargetInfo | None:
    return None if of is None else read_target(of)


def drafter(draft: Path | Literal["ngram"] | None) -> DraftInfo | Literal["ngram"] | None:
    return read_draft(draft) if isinstance(draft, Path) else draft
