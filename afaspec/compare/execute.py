"""How each kind of cell is done."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from afaspec.adapters.afa import read_record
from afaspec.adapters.annealing import refuse_non_linear
from afaspec.capture.plan import plan_capture
from afaspec.capture.run import CaptureProgress, capture
from afaspec.checkpoints.merge import find_result, load_result, merge, merged_weights
from afaspec.compare.config import CompareConfig
from afaspec.compare.data import Prompts, capture_config, divide
from afaspec.compare.ledger import Ledger
from afaspec.compare.plan import Cell, Json, Plan, train_config
from afaspec.store.read import FeatureStore
from afaspec.train.config import RunPlace, TrainConfig
from afaspec.train.run import train
from bench.engine.run import run_bench
from bench.records.acceptance import Acceptance
from bench.records.arms import Arm
from bench.records.config import BenchConfig
from bench.records.progress import Progress
from bench.report.files import write_report
from bench.stats.offline import Captured, offline_acceptance
from drafts.errors import UserError
from drafts.files import read_json, write_json
from drafts.nn.interface import Draft
from drafts.registry import load_draft, module_names, read_draft
from drafts.target import read_target
from drafts.tensors import open_tensors

LOSSES_KEPT = 200  # points of a training curve


class Executor:
    """Does cells of one study. `target` is the resolved target's folder.

    `progress` is told (what, done, total) while a cell is being done.
    """

    def __init__(
        self,
        config: CompareConfig,
        target: Path,
        prompts: Prompts,
        ledger: Ledger,
        progress: Progress,
    ):
        self.config, self.target, self.prompts = config, target, prompts
        self.ledger, self.progress = ledger, progress
        self._stores: dict[Path, FeatureStore] = {}

    def do(self, cell: Cell, plan: Plan) -> Json:
        """The cell's result. What it needs of other cells is in the ledger."""
        doing: dict[str, Callable[[Cell, Plan], Json]] = {
            "data": self._data,
            "base": self._base,
            "run": self._run,
            "eval": self._eval,
            "vllm": self._vllm,
        }
        return doing[cell.kind](cell, plan)

    def run_folder(self, run: Cell) -> Path:
        return self.config.out / "runs" / run.key

    def _data(self, cell: Cell, plan: Plan) -> Json:
        stores = {side: self._capture(cell, side) for side in ("train", "eval")}
        sides = divide(
            stores["train"],
            stores["eval"],
            self.prompts[cell.domain, "train"],
            self.config.tuning.validation,
        )
        return {
            **asdict(sides),
            "eval_sequences": len(stores["eval"]),
            "train_tokens": stores["train"].tokens,
            "eval_tokens": stores["eval"].tokens,
        }

    def _capture(self, cell: Cell, side: Any) -> FeatureStore:
        def on_progress(now: CaptureProgress) -> None:
            self.progress(f"{cell.domain}: answers ({side})", int(now.done), now.total)

        settings = capture_config(self.config, cell.domain, side, self._store_folder(cell, side))
        return capture(settings, on_progress)

    def _base(self, cell: Cell, plan: Plan) -> Json:
        store = self._store(plan.only("data", cell.domain), "eval")
        draft = load_draft(read_draft(self.config.draft), read_target(self.target))
        return counted(draft, self._all(store), self.config.k)

    def _run(self, cell: Cell, plan: Plan) -> Json:
        assert cell.variant
        assert cell.rate is not None
        assert cell.seed is not None
        data = plan.only("data", cell.domain)
        sides = self.ledger[data.key]
        settings = train_config(
            self.config, cell.variant, cell.rate, cell.seed, cell.settings["steps"]
        ).model_copy(
            update={
                "store": self._store(data, "train").folder,
                "target": self.target,
                "out": self.run_folder(cell),
            }
        )
        follow(settings)
        trained = train(
            settings,
            lambda row: self.progress(cell.name, row["step"], settings.steps),
            sides=(
                sides["train"][: cell.variant.samples],
                sides["validation"][: self.config.tuning.validation_limit],
            ),
        )
        manifest = read_json(trained.folder / "manifest.json")
        added = 0 if settings.arm == "full" else manifest["trainable_parameters"]
        return {
            "sequences": len(sides["train"][: cell.variant.samples]),
            "validation_acceptance_length": trained.acceptance_length,
            "best_step": trained.best_step,
            "trainable_parameters": manifest["trainable_parameters"],
            "draft_parameters": manifest["draft_parameters"] - added,  # the base draft's
            "train_seconds": manifest["seconds"],
            "curve": training_curve(trained.folder),
        }

    def _eval(self, cell: Cell, plan: Plan) -> Json:
        store = self._store(plan.only("data", cell.domain), "eval")
        result, _ = find_result(self._trained(plan.runs[cell.key], plan))
        draft = merged_draft(self.config.draft, self.target, result)
        return counted(draft, self._all(store), self.config.k)

    def _vllm(self, cell: Cell, plan: Plan) -> Json:
        wanted, data = self.config.vllm, plan.only("data", cell.domain)
        arms, offline, curves = [Arm("none"), Arm("base", read_draft(self.config.draft))], {}, {}
        offline["base"] = as_acceptance(self.ledger[plan.only("base", cell.domain).key])
        for final in (c for c in plan.cells if c.key in cell.inputs["evals"]):
            assert final.variant
            run = plan.runs[final.key]
            name = final.variant.label(self.config)
            arms.append(Arm(name, read_draft(self._merged(run, plan))))
            offline[name] = as_acceptance(self.ledger[final.key])
            curves[name] = self.ledger[run.key]["curve"]
        settings = capture_config(
            self.config, cell.domain, "eval", self._store_folder(data, "eval")
        )
        prompts = plan_capture(settings, lambda text: None).prompts[: wanted.prompts]
        bench = BenchConfig(
            target=self.target,
            prompts=self.config.domains[cell.domain].prompts,
            arms=tuple(arms),
            k=self.config.k,
            max_tokens=wanted.max_tokens,
            rounds=wanted.rounds,
            concurrency=wanted.concurrency,
            enforce_eager=wanted.enforce_eager,
            cache_gib=wanted.cache_gib,
            seed=cell.seed or 0,
        )
        folder = self.config.out / "vllm" / f"{cell.domain}-seed{cell.seed}"
        report = run_bench(
            bench,
            self.progress,
            prompts=prompts,
            offline=offline,
            training=curves,
            log_folder=folder / "logs",
        )
        write_report(report, folder)
        return report.as_json()

    def _trained(self, run: Cell, plan: Plan) -> Path:
        """The folder of a finished run, trained again where it was deleted."""
        folder = self.run_folder(run)
        if not any((folder / name).exists() for name in ("adapter", "weights")):
            shutil.rmtree(folder, ignore_errors=True)
            self._run(run, plan)
        return folder

    def _merged(self, run: Cell, plan: Plan) -> Path:
        folder = self.config.out / "merged" / run.key
        if not folder.exists():
            merge(self._trained(run, plan), self.config.draft, folder, self.target)
        return folder

    def _store_folder(self, data: Cell, side: str) -> Path:
        return self.config.out / "stores" / f"{data.domain}-{side}-{data.key}"

    def _store(self, data: Cell, side: str) -> FeatureStore:
        folder = self._store_folder(data, side)
        if folder not in self._stores:
            store = FeatureStore.open(folder) if folder.exists() else self._again(data, side)
            self._stores[folder] = store
        return self._stores[folder]

    def _again(self, data: Cell, side: str) -> FeatureStore:
        """A store that another machine captured, or that was deleted. Greedy answers repeat."""
        store = self._capture(data, side)
        if store.tokens != self.ledger[data.key][f"{side}_tokens"]:
            raise UserError(
                f"the target answers {data.domain} otherwise here than where the study was begun",
                where=store.folder,
                hint="go on there, or begin anew in another --out",
            )
        return store

    @staticmethod
    def _all(store: FeatureStore) -> Any:
        return (store[i] for i in range(len(store)))

    def tidy(self, plan: Plan) -> None:
        """Delete what `keep` does not ask for and no cell will read again."""
        if self.config.keep == "all":
            return
        waiting = [*plan.pending(self.ledger), *plan.later]
        pending = {cell.key for cell in waiting}
        in_vllm = any(cell.kind == "vllm" for cell in waiting)
        finals = {run.key: final for final, run in plan.runs.items()}
        for run in plan.cells:
            if run.kind != "run" or run.key not in self.ledger:
                continue
            folder, final = self.run_folder(run), finals.get(run.key)
            shutil.rmtree(folder / "checkpoint", ignore_errors=True)
            assert run.variant
            undecided = plan.choices[run.domain, run.variant].rate is None
            wanted = final and (in_vllm or final in pending or self.config.keep == "adapters")
            if not wanted and not undecided:
                shutil.rmtree(folder, ignore_errors=True)
        if self.config.keep == "none" and not in_vllm:
            shutil.rmtree(self.config.out / "merged", ignore_errors=True)


def follow(settings: TrainConfig) -> None:
    """Let a run that was left half done find its store and models where they are now.

    A study may be moved, and the key of a run's cell says already that they are the same.
    """
    path = settings.out / "config.json"
    if path.exists():
        places = settings.model_dump(mode="json", include={*RunPlace.model_fields})
        write_json(path, read_json(path) | places)


def as_acceptance(result: Json) -> Acceptance:
    """The counts of an evaluated cell."""
    import numpy as np

    return Acceptance(np.array(result["drafts"]), np.array(result["accepted"]))


def training_curve(run: Path) -> Json:
    """Loss and validation acceptance by step, thinned out, as the report's plot takes them."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    stride = -(-len(rows) // LOSSES_KEPT)
    kept = [row for row in rows if row["step"] % stride == 0 or "acceptance_length" in row]
    losses = [row["loss"] if math.isfinite(row["loss"]) else None for row in kept]
    return {
        "step": [row["step"] for row in kept],
        "loss": [None if loss is None else round(loss, 5) for loss in losses],
        "acceptance_length": [row.get("acceptance_length") for row in kept],
    }


def merged_draft(base: Path, target: Path, result: Path) -> Draft:
    """What `merge` would write and `load_draft` read: merged weights, rounded to the base's types.

    Raises `UserError` for an adapter that is not linear yet.
    """
    refuse_non_linear(read_record(result).beta, where=result)
    info, opened = read_draft(base), read_target(target)
    weights = merged_weights(load_result(load_draft(info, opened), result))
    merged = load_draft(info, opened).eval()
    stored = open_tensors(base)
    for name, own in module_names(info).items():
        if own in weights:
            weights[own] = weights[own].to(stored.load(name).dtype)
    merged.load_state_dict({n: w.float() for n, w in weights.items()}, strict=False)
    return merged


def counted(draft: Draft, sequences: Iterable[Captured], k: int) -> dict[str, list]:
    """Offline acceptance as counts: `drafts` [prompts], and `accepted` [prompts][k]."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = offline_acceptance(draft.to(device).eval(), sequences, k)
    return {
        "drafts": found.drafts_per_prompt.tolist(),
        "accepted": found.accepted_per_prompt.tolist(),
    }
