"""How each kind of task is done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from afaspec.capture.plan import plan_capture, settle
from afaspec.capture.run import CaptureProgress, capture
from afaspec.checkpoints.merge import find_result, load_merged, merge
from afaspec.compare.config import GENERAL, CompareConfig
from afaspec.compare.data import SPLITS, capture_config, divide_store
from afaspec.compare.ledger import Ledger
from afaspec.compare.plan import Json, Plan, Task, train_config
from afaspec.store.read import FeatureStore
from afaspec.train.metrics import training_curve
from afaspec.train.run import train
from bench.engine.run import run_bench
from bench.prompts.select import Split
from bench.records.acceptance import Acceptance
from bench.records.arms import Arm
from bench.records.config import BenchConfig
from bench.records.progress import Progress
from bench.report.files import write_report
from bench.stats.offline import offline_acceptance
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.files import read_json
from drafts.nn.interface import Draft
from drafts.registry import load_draft, read_draft
from drafts.target.info import TargetInfo

CURVE, CURVE_POINTS = ("step", "loss", "acceptance_length"), 200  # that are kept of a training


class Executor:
    """Does tasks of one study, whose models are handed in opened.

    `progress` is told (what, done, total) while a task is being done.
    """

    def __init__(
        self,
        config: CompareConfig,
        target: TargetInfo,
        draft: DraftInfo,
        ledger: Ledger,
        progress: Progress,
    ):
        self.config, self.target, self.draft = config, target, draft
        self.ledger, self.progress = ledger, progress
        self._stores: dict[Path, FeatureStore] = {}

    def run(self, task: Task, plan: Plan) -> Json:
        """The task's result. What it needs of other tasks is in the ledger."""
        by_kind: dict[str, Callable[[Task, Plan], Json]] = {
            "data": self._data,
            "base": self._base,
            "run": self._run,
            "eval": self._eval,
            "kept": self._kept,
            "vllm": self._vllm,
        }
        return by_kind[task.kind](task, plan)

    def run_folder(self, run: Task) -> Path:
        return self.config.out / "runs" / run.key

    def _data(self, task: Task, plan: Plan) -> Json:
        train_store, eval_store = (self._capture(task, split) for split in SPLITS)
        division = divide_store(train_store, eval_store, self.config.tuning.validation)
        return {
            "train": division.train.tolist(),
            "validation": division.held_out.tolist(),
            "dropped": division.dropped,
            "eval_sequences": len(eval_store),
            "train_tokens": train_store.tokens,
            "eval_tokens": eval_store.tokens,
        }

    def _capture(self, task: Task, split: Split) -> FeatureStore:
        def on_progress(now: CaptureProgress) -> None:
            self.progress(f"{task.domain}: answers ({split})", int(now.done), now.total)

        settings = capture_config(self.config, task.domain, split, self._store_folder(task, split))
        return capture(settings, self.target, self.draft, on_progress)

    def _base(self, task: Task, plan: Plan) -> Json:
        return self._measure(load_draft(self.draft, self.target), task.domain, plan)

    def _run(self, task: Task, plan: Plan) -> Json:
        assert task.variant
        assert task.rate is not None
        assert task.seed is not None
        data = plan.only("data", task.domain)
        division = self.ledger[data.key]
        train_ids = division["train"][: task.variant.samples]
        store = self._store(data, "train")
        share = self.config.arms[task.variant.arm].mix
        general = share and self._store(plan.only("data", GENERAL), "train").folder
        places = {
            "mix": [f"{general}={share}"] if share else None,
            "store": store.folder,
            "draft": str(self.draft.folder),
            "target": str(self.target.folder),
            "out": self.run_folder(task),
        }
        settings = train_config(
            self.config, task.variant, task.rate, task.seed, task.settings["steps"]
        ).model_copy(update=places)
        trained = train(
            settings,
            store,
            self.draft,
            self.target,
            lambda row: self.progress(task.name, row["step"], settings.steps),
            split=(train_ids, division["validation"][: self.config.tuning.validation_limit]),
        )
        manifest = read_json(trained.folder / "manifest.json")
        added = 0 if settings.arm == "full" else manifest["trainable_parameters"]
        return {
            "sequences": len(train_ids),
            "validation_acceptance_length": trained.length,
            "best_step": trained.best_step,
            "trainable_parameters": manifest["trainable_parameters"],
            "draft_parameters": manifest["draft_parameters"] - added,  # the base draft's
            "train_seconds": manifest["seconds"],
            "curve": training_curve(trained.folder, CURVE, CURVE_POINTS),
        }

    def _eval(self, task: Task, plan: Plan) -> Json:
        return self._measure(self._merged_module(task, plan), task.domain, plan)

    def _kept(self, task: Task, plan: Plan) -> Json:
        return self._measure(self._merged_module(task, plan), GENERAL, plan)

    def _merged_module(self, task: Task, plan: Plan) -> Draft:
        result, _ = find_result(self._trained(plan.runs[task.key], plan))
        return load_merged(self.draft, result, self.target)

    def _measure(self, draft: Draft, domain: str, plan: Plan) -> Json:
        """Offline acceptance on the eval split of the domain."""
        store = self._store(plan.only("data", domain), "eval")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return as_counts(offline_acceptance(draft.to(device), store, self.config.k))

    def _vllm(self, task: Task, plan: Plan) -> Json:
        wanted, data = self.config.vllm, plan.only("data", task.domain)
        arms, offline, curves = [Arm("none"), Arm("base", self.draft)], {}, {}
        offline["base"] = as_acceptance(self.ledger[plan.only("base", task.domain).key])
        for final in (c for c in plan.tasks if c.key in task.inputs["evals"]):
            assert final.variant
            run = plan.runs[final.key]
            name = final.variant.label(self.config)
            arms.append(Arm(name, read_draft(self._merged(run, plan))))
            offline[name] = as_acceptance(self.ledger[final.key])
            curves[name] = self.ledger[run.key]["curve"]
        settings = capture_config(
            self.config, task.domain, "eval", self._store_folder(data, "eval")
        )
        setup = settle(settings, self.target, self.draft)
        asked = plan_capture(setup, lambda text: None).prompts
        prompts = [one.prompt for one in asked]
        bench = BenchConfig(
            target=self.target,
            prompts=self.config.domains[task.domain].prompts,
            arms=tuple(arms),
            k=self.config.k,
            seed=task.seed or 0,
            **wanted.model_dump(exclude={"arms", "seeds", "prompts"}),
        )
        folder = self.config.out / "vllm" / f"{task.domain}-seed{task.seed}"
        report = run_bench(
            bench,
            self.progress,
            prompts=prompts[: wanted.prompts],
            offline=offline,
            training=curves,
            log_folder=folder / "logs",
        )
        write_report(report, folder)
        return report.as_json()

    def _trained(self, run: Task, plan: Plan) -> Path:
        """The folder of a finished run, trained again where it was deleted."""
        folder = self.run_folder(run)
        if not any((folder / name).exists() for name in ("adapter", "weights")):
            shutil.rmtree(folder, ignore_errors=True)
            self._run(run, plan)
        return folder

    def _merged(self, run: Task, plan: Plan) -> Path:
        folder = self.config.out / "merged" / run.key
        if not folder.exists():
            merge(self._trained(run, plan), self.draft, folder, self.target)
        return folder

    def _store_folder(self, data: Task, split: Split) -> Path:
        return self.config.out / "stores" / f"{data.domain}-{split}-{data.key}"

    def _store(self, data: Task, split: Split) -> FeatureStore:
        folder = self._store_folder(data, split)
        if folder not in self._stores:
            store = FeatureStore.open(folder) if folder.exists() else self._recapture(data, split)
            self._stores[folder] = store
        return self._stores[folder]

    def _recapture(self, data: Task, split: Split) -> FeatureStore:
        """A store that another machine captured, or that was deleted. Greedy answers repeat."""
        store = self._capture(data, split)
        if store.tokens != self.ledger[data.key][f"{split}_tokens"]:
            raise UserError(
                f"the target answers {data.domain} otherwise here than where the study was begun",
                where=store.folder,
                hint="go on there, or begin anew in another --out",
            )
        return store

    def delete_unneeded(self, plan: Plan) -> None:
        """Delete what `keep` does not ask for and no task will read again."""
        if self.config.keep == "all":
            return
        waiting = [*plan.pending(self.ledger), *plan.later]
        pending = {task.key for task in waiting}
        in_vllm = any(task.kind == "vllm" for task in waiting)
        finals = {run.key: final for final, run in plan.runs.items()}
        for run in plan.tasks:
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


def as_counts(found: Acceptance) -> Json:
    """What is stored of an acceptance: `drafts` [prompts], and `accepted` [prompts][k]."""
    return {
        "drafts": found.drafts_per_prompt.tolist(),
        "accepted": found.accepted_per_prompt.tolist(),
    }


def as_acceptance(counts: Json) -> Acceptance:
    """The inverse of `as_counts`."""
    return Acceptance(np.array(counts["drafts"]), np.array(counts["accepted"]))
