"""AFA in Trainer, SFTTrainer and GRPOTrainer: beta follows their steps, and the end is a LoRA."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import (
    DataCollatorForLanguageModeling,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from afaspec.adapters.afa import adapt, read_record
from afaspec.adapters.annealing import annealed_layers
from afaspec.adapters.callback import AnnealingCallback
from afaspec.adapters.schedule import AnnealingSchedule
from afaspec.capture.target_model import load_model, load_tokenizer
from drafts.errors import UserError
from tests.vllm_client import VllmWorker

STEPS, ACCUMULATION = 6, 2
SCHEDULE = AnnealingSchedule(shape="linear", end=1.0)
BETAS = [SCHEDULE.beta(step, STEPS) for step in range(STEPS + 1)]  # 1, 0.8, 0.6, 0.4, 0.2, 0, 0
TEXTS = ["def parse(self, text):", "import argparse", "return None", "for name in names:"] * 6
KINDS = ["trainer", "sft", "grpo"]
Make = Callable[..., Trainer]


def adapted(target: Path, sigma: str | None = "silu", **settings: Any) -> PeftModel:
    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **settings
    )
    return adapt(load_model(target, "float32"), config, sigma)


def rows(target: Path) -> Dataset:
    return Dataset.from_dict(dict(load_tokenizer(target)(TEXTS)))


def of_e(completions: list[str], **_: Any) -> list[float]:
    """A reward that differs within a group: the share of the letter e."""
    return [text.count("e") / (len(text) + 1) for text in completions]


def trainer_of(kind: str, model: Any, target: Path, out: Path, **settings: Any) -> Trainer:
    """A trainer of that kind that is not yet begun."""
    callbacks = settings.pop("callbacks", None) or [AnnealingCallback(SCHEDULE)]
    eval_rows = rows(target).select(range(2)) if "eval_strategy" in settings else None
    common: dict[str, Any] = {
        "output_dir": str(out),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATION,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **settings,
    }
    tokenizer = load_tokenizer(target)
    if kind == "trainer":
        return Trainer(
            model,
            TrainingArguments(**common),
            train_dataset=rows(target),
            eval_dataset=eval_rows,
            data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
            callbacks=callbacks,
        )
    if kind == "sft":
        return SFTTrainer(
            model,
            SFTConfig(max_length=32, **common),
            train_dataset=rows(target).select_columns("input_ids"),
            eval_dataset=eval_rows,
            processing_class=tokenizer,
            callbacks=callbacks,
        )
    config = GRPOConfig(num_generations=2, max_completion_length=4, beta=0.1, **common)
    return GRPOTrainer(
        model,
        of_e,
        config,
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def watch(model: PeftModel) -> list[tuple[bool, float]]:
    """For every forward pass from now on: whether it learns, and its beta."""
    seen: list[tuple[bool, float]] = []
    first = annealed_layers(model, "default")[0]
    module = next(m for m in model.modules() if getattr(m, "lora_variant", None))
    active = model.base_model

    def note(*_: Any) -> None:
        if active.active_adapters == ["default"]:
            seen.append((torch.is_grad_enabled(), first.beta))

    module.register_forward_pre_hook(note)
    return seen


def logged(trainer: Trainer) -> list[tuple[int, float]]:
    return [(entry["step"], entry["beta"]) for entry in trainer.state.log_history]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(folder / "adapter_model.safetensors")
    return found


class KilledError(Exception):
    pass


class KillAfter(TrainerCallback):
    """Ends training as an error would, when step `step + 1` begins."""

    def __init__(self, step: int):
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            raise KilledError


@pytest.mark.parametrize("kind", KINDS)
def test_beta_follows_the_optimizer_step(kind: str, tiny_target: Path, tmp_path: Path) -> None:
    model = adapted(tiny_target)
    seen = watch(model)
    trainer = trainer_of(kind, model, tiny_target, tmp_path)
    trainer.train()
    learning = [beta for learns, beta in seen if learns]
    assert learning == [beta for beta in BETAS[:STEPS] for _ in range(ACCUMULATION)]
    generating = [beta for learns, beta in seen if not learns]
    if kind == "grpo":  # each step learns from what was generated with the step's own beta
        assert [beta for beta, _ in itertools.groupby(generating)] == BETAS[:STEPS]
    assert logged(trainer) == [(s, BETAS[s]) for s in range(1, STEPS + 1)] + [(STEPS, 0.0)]
    assert {layer.beta for layer in annealed_layers(model)} == {0.0}


def test_epochs_and_evaluation(tiny_target: Path, tmp_path: Path) -> None:
    model = adapted(tiny_target)
    seen = watch(model)
    trainer = trainer_of(
        "trainer", model, tiny_target, tmp_path,
        max_steps=-1, num_train_epochs=2, per_device_train_batch_size=8,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    trainer.train()  # 24 texts, 16 a step: 2 steps an epoch
    betas = [SCHEDULE.beta(step, 4) for step in range(5)]
    assert trainer.state.max_steps == 4
    assert [beta for learns, beta in seen if not learns] == betas[1:]
    assert [beta for beta, _ in itertools.groupby(b for learns, b in seen if learns)] == betas[:4]


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_run_ends_as_one_without_a_break(
    kind: str, tiny_target: Path, tmp_path: Path
) -> None:
    whole = trainer_of(kind, adapted(tiny_target), tiny_target, tmp_path / "whole")
    whole.train()
    whole.save_model()

    saving = {"save_strategy": "steps", "save_steps": 3}
    broken = trainer_of(
        kind, adapted(tiny_target), tiny_target, tmp_path / "broken", **saving,
        callbacks=[AnnealingCallback(SCHEDULE), KillAfter(4)],
    )  # fmt: skip
    with pytest.raises(KilledError):
        broken.train()
    record = read_record(tmp_path / "broken/checkpoint-3")
    assert (record.activation, record.beta, record.step) == ("silu", BETAS[3], 3)

    model = adapted(tiny_target)
    seen = watch(model)
    resumed = trainer_of(kind, model, tiny_target, tmp_path / "broken", **saving)
    resumed.train(resume_from_checkpoint=True)
    resumed.save_model()
    learning = [beta for learns, beta in seen if learns]
    assert learning == [beta for beta in BETAS[3:STEPS] for _ in range(ACCUMULATION)]
    assert logged(resumed) == logged(whole)
    ours, expected = weights(tmp_path / "broken"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    for folder in (tmp_path / "broken", tmp_path / "broken/checkpoint-6", tmp_path / "whole"):
        record = read_record(folder)
        assert (record.activation, record.beta, record.step) == ("silu", 0.0, STEPS)


@pytest.mark.parametrize("kind", KINDS)
def test_without_annealing_it_is_plain_lora(kind: str, tiny_target: Path, tmp_path: Path) -> None:
    """A schedule that is at zero from the start trains what plain LoRA trains; the other does not.

    So the callback changes beta alone, and plain LoRA is left as it is.
    """
    adapters = {}
    for name, sigma, schedule in (
        ("plain", None, None),
        ("zero", "silu", AnnealingSchedule(end=1e-9)),
        ("annealed", "silu", SCHEDULE),
    ):
        callbacks = [AnnealingCallback(schedule)] if schedule else [TrainerCallback()]
        model = adapted(tiny_target, sigma)
        trainer = trainer_of(kind, model, tiny_target, tmp_path / name, callbacks=callbacks)
        trainer.train()
        trainer.save_model()
        adapters[name] = weights(tmp_path / name)
    assert all(torch.equal(adapters["zero"][k], v) for k, v in adapters["plain"].items())
    assert not all(torch.equal(adapters["annealed"][k], v) for k, v in adapters["plain"].items())


def test_grpos_reference_is_what_training_began_with(tiny_target: Path, tmp_path: Path) -> None:
    """TRL copies the adapter as `ref`: a trained LoRA stays that LoRA, its beta is 0 throughout."""
    ids = torch.arange(1, 20)[None]
    model = adapted(tiny_target)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    for layer in annealed_layers(model):
        layer.beta = 0.0
    expected = model.eval()(input_ids=ids).logits.detach()
    references: list[float] = []

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            references.extend(layer.beta for layer in annealed_layers(model, "ref"))

    callbacks = [Look(), AnnealingCallback(SCHEDULE)]
    trainer_of("grpo", model, tiny_target, tmp_path, callbacks=callbacks).train()
    assert references == [0.0] * 28 * STEPS
    model.eval().set_adapter("ref")
    assert (model(input_ids=ids).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    model.set_adapter("default")
    assert (model(input_ids=ids).logits - expected).abs().max() > 1e-2 * expected.abs().max()


def test_the_best_model_is_sought_among_plain_loras(tiny_target: Path, tmp_path: Path) -> None:
    """The highest loss of all (as the best is meant here) is of a step that is still non-linear."""
    trainer = trainer_of(
        "trainer", adapted(tiny_target), tiny_target, tmp_path, learning_rate=1.0,
        eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        load_best_model_at_end=True, metric_for_best_model="loss", greater_is_better=True,
        callbacks=[AnnealingCallback(AnnealingSchedule(shape="linear", end=3))],
    )  # fmt: skip
    trainer.train()
    losses = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    assert max(losses, key=lambda step: losses[step]) < 3
    best = max((3, 4, 5, 6), key=lambda step: losses[step])
    assert trainer.state.best_global_step == best
    trainer.save_model()
    kept = weights(tmp_path / f"checkpoint-{best}")
    assert all(torch.equal(weights(tmp_path)[name], kept[name]) for name in kept)


@pytest.fixture(scope="module")
def finished(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that SFTTrainer has trained to its end and saved."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = trainer_of("sft", adapted(tiny_target), tiny_target, folder, learning_rate=0.1)
    trainer.train()
    trainer.save_model()
    ids = torch.arange(1, 60)[None]
    with torch.no_grad():
        torch.save(trainer.model.eval()(input_ids=ids).logits, folder / "said.pt")
    return folder


def test_the_finished_adapter_is_a_stock_lora(finished: Path, tiny_target: Path) -> None:
    assert json.loads((finished / "adapter_config.json").read_text())["peft_type"] == "LORA"
    base = load_model(tiny_target, "float32")
    ids = torch.arange(1, 60)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        stock = PeftModel.from_pretrained(base, str(finished))
        said = stock(input_ids=ids).logits
    expected = torch.load(finished / "said.pt")
    assert not annealed_layers(stock)
    assert (said - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (before - expected).abs().max() > 1e-2 * expected.abs().max()


def test_the_finished_adapter_serves_in_vllm(
    finished: Path, tiny_target: Path, vllm_worker: VllmWorker
) -> None:
    prompts = [[5, 17, 301, 44, 90], list(range(30, 60))]
    stock = PeftModel.from_pretrained(load_model(tiny_target, "float32"), str(finished))
    merged = stock.merge_and_unload()
    expected = []
    for prompt in prompts:
        said = merged.generate(
            torch.tensor([prompt]), max_new_tokens=24, min_new_tokens=24, do_sample=False
        )
        expected.append(said[0, len(prompt) :].tolist())
    answers = vllm_worker.serve_lora(tiny_target, finished, prompts, 24)
    assert answers["adapted"] == expected
    assert answers["base"] != expected


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_annealed_layers_is_refused(
    kind: str, tiny_target: Path, tmp_path: Path
) -> None:
    for model in (adapted(tiny_target, None), load_model(tiny_target, "float32")):
        with pytest.raises(UserError, match="no annealed layers"):
            trainer_of(kind, model, tiny_target, tmp_path)


def test_a_callback_that_comes_late_is_refused_too(tiny_target: Path, tmp_path: Path) -> None:
    trainer = trainer_of(
        "trainer", adapted(tiny_target, None), tiny_target, tmp_path, callbacks=[TrainerCallback()]
    )
    trainer.add_callback(AnnealingCallback())
    with pytest.raises(UserError, match="no annealed layers"):
        trainer.train()


class StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop |= state.global_step == self.step


def test_stopping_half_way_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    callbacks = [AnnealingCallback(SCHEDULE), StopAfter(2)]
    trainer = trainer_of(
        "trainer", adapted(tiny_target), tiny_target, tmp_path, callbacks=callbacks
    )
    with pytest.raises(UserError, match=r"step 2 of 6.*non-linear \(beta = 0.6\)"):
        trainer.train()
    assert not (tmp_path / "annealing.json").exists()


def test_another_schedule_is_refused_on_resuming(tiny_target: Path, tmp_path: Path) -> None:
    callbacks = [AnnealingCallback(SCHEDULE), KillAfter(3)]
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer = trainer_of(
        "trainer", adapted(tiny_target), tiny_target, tmp_path, callbacks=callbacks, **saving
    )
    with pytest.raises(KilledError):
        trainer.train()
    longer = trainer_of("trainer", adapted(tiny_target), tiny_target, tmp_path, max_steps=12)
    with pytest.raises(UserError, match=r"at step 3 its beta was 0.4, here it is 0.7273"):
        longer.train(resume_from_checkpoint=True)


def test_generating_from_merged_weights_is_refused(tiny_target: Path, tmp_path: Path) -> None:
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], use_cpu=True)
    args.use_vllm = True
    with pytest.raises(UserError, match="use_vllm"):
        Trainer(adapted(tiny_target), args, callbacks=[AnnealingCallback()])
