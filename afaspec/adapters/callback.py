"""AFA in transformers' `Trainer` and in what is built on it, such as TRL's trainers.

    model = adapt(model, LoraConfig(...), "silu")
    trainer = SFTTrainer(model, ..., callbacks=[AnnealingCallback(AnnealingSchedule())])

beta is a function of the trainer's own count of optimizer steps, which its checkpoints hold: a run
that is resumed goes on with the beta that it stopped at, whatever the gradient accumulation.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from afaspec.adapters.afa import RECORD, write_record
from afaspec.adapters.annealing import AnnealedLora, Annealer, annealed_layers
from afaspec.adapters.schedule import AnnealingSchedule
from drafts.errors import UserError

LOGGED = "beta"


class AnnealingCallback(TrainerCallback):
    """Anneals the adapter of a model made by `afaspec.adapters.afa.adapt`, by `schedule`.

    Adds `beta` to what the trainer logs, and `annealing.json` to the adapter of each checkpoint and
    to the trainer's output folder, where `trainer.save_model()` puts the finished adapter.
    Raises `UserError` where the trainer is made or begins, if nothing there can be annealed.
    """

    def __init__(self, schedule: AnnealingSchedule | None = None):
        self.schedule = schedule or AnnealingSchedule()
        self.annealer: Annealer | None = None  # from the beginning of training on

    def on_init_end(self, args: TrainingArguments, *_: Any, model: Any, **__: Any) -> None:
        """Refuse here already what could not be trained."""
        trained_layers(model)
        refuse_vllm(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any, **__: Any
    ) -> None:
        """Set beta to what belongs to the step at which training begins or goes on."""
        if state.is_hyper_param_search:
            raise UserError(
                "hyper-parameter search is not annealed", hint="train each trial with a Trainer"
            )
        refuse_vllm(args)
        layers = trained_layers(model)
        for frozen in set(annealed_layers(model)) - set(layers):
            frozen.beta = 0.0  # GRPO's reference: what the weights say as the LoRA they will be
        self.annealer = Annealer(layers, self.schedule, state.max_steps)
        refuse_another_schedule(self.annealer, state)
        sync_beta(self.annealer, state)

    def on_step_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """A best model so far with beta > 0 is none: the best is sought among plain LoRAs."""
        if self.annealer is not None and self.annealer.beta > 0:
            state.best_metric = state.best_model_checkpoint = None
            state.best_global_step = 0

    def on_step_end(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        """After each optimizer step, before the trainer logs, evaluates and saves."""
        if self.annealer is not None:
            sync_beta(self.annealer, state)

    def on_log(self, args: Any, state: TrainerState, *_: Any, logs: Any = None, **__: Any) -> None:
        """Add beta for those that are told after this one, and to the trainer's own history."""
        if self.annealer is None:
            return
        for record in ([] if logs is None else [logs]) + state.log_history[-1:]:
            record[LOGGED] = self.annealer.beta

    def on_save(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any, **__: Any
    ) -> None:
        """Record beta beside the checkpoint that was just written."""
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
        self._record(model, folder, state)
        if state.is_world_process_zero and len(model.peft_config) > 1:
            copy_to_subfolder(folder, model.active_adapter)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, *_: Any, model: Any, **__: Any
    ) -> None:
        """Record the finished adapter. Raises `UserError` if training was stopped half-way."""
        if self.annealer is not None and self.annealer.beta > 0:
            raise UserError(
                f"training stopped at step {state.global_step} of {state.max_steps}, where the "
                f"adapter is still non-linear (beta = {self.annealer.beta:.4g})",
                where=args.output_dir,
                hint="go on from its last checkpoint: trainer.train(resume_from_checkpoint=True)",
            )
        self._record(model, Path(args.output_dir), state)

    def _record(self, model: Any, folder: Path, state: TrainerState) -> None:
        if state.is_world_process_zero:
            write_record(model, folder, self.schedule, state.global_step, state.max_steps)


def sync_beta(annealer: Annealer, state: TrainerState) -> None:
    """Set beta by the trainer's count of steps."""
    annealer.load_state_dict({"step": state.global_step, "total_steps": state.max_steps})


def trained_layers(model: Any) -> list[AnnealedLora]:
    """The annealed layers of the model's active adapter. Raises `UserError` if it has none."""
    layers = annealed_layers(model, model.active_adapter) if isinstance(model, PeftModel) else []
    if not layers:
        raise UserError(
            "the model has no annealed layers, so that there is nothing to anneal",
            hint="wrap it with afaspec.adapters.afa.adapt(model, LoraConfig(...), 'silu') and give "
            "the trainer that, without peft_config; for plain LoRA leave the callback out",
        )
    return layers


def copy_to_subfolder(checkpoint: Path, adapter: str) -> None:
    """Let the trainer find the `adapter` again that it saved in the folder `checkpoint` itself.

    Where a checkpoint has further adapters in subfolders (GRPO's reference), transformers resumes
    from these alone, and would go on with an untrained adapter.
    """
    (checkpoint / adapter).mkdir(exist_ok=True)
    for path in [*checkpoint.glob("adapter_*"), checkpoint / RECORD]:
        shutil.copyfile(path, checkpoint / adapter / path.name)


def refuse_vllm(args: TrainingArguments) -> None:
    """TRL's vLLM generates from merged weights, which cannot say what beta > 0 says."""
    if getattr(args, "use_vllm", False):
        raise UserError(
            "use_vllm generates from merged weights, and an adapter with beta > 0 cannot be merged",
            hint="set use_vllm=False, so that the model in training generates",
        )


def refuse_another_schedule(annealer: Annealer, state: TrainerState) -> None:
    """What the checkpoint logged of beta must be what this schedule gives: beta never rises."""
    logged = [entry for entry in state.log_history if LOGGED in entry]
    if not logged:
        return
    step, beta = logged[-1]["step"], logged[-1][LOGGED]
    annealer.load_state_dict({"step": step, "total_steps": state.max_steps})
    if abs(annealer.beta - beta) > 1e-6:
        raise UserError(
            f"the checkpoint was annealed otherwise: at step {step} its beta was {beta:.4g}, here "
            f"it is {annealer.beta:.4g}",
            hint="resume with the schedule and the number of steps that it began with",
        )
