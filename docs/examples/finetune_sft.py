"""Supervised fine-tuning of a target with TRL's SFTTrainer: LoRA against AFA-LoRA.

The embedded target, which was trained on Python, learns C++ headers. Measured is the loss of the
next token on headers that neither training nor the choice of a learning rate has seen.

    python docs/examples/finetune_sft.py --out runs/sft
    python docs/examples/finetune_sft.py --out runs/mine --data FOLDER_OR_JSONL --seeds 5
    python docs/examples/finetune_sft.py --out runs/other --target MODEL_FOLDER --rate 1e-4

What is compared, and how, is in finetune_arms.py. A second call goes on where the first one
stopped.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset, disable_progress_bars
from finetune_arms import (
    End,
    Json,
    Method,
    Out,
    Part,
    Rank,
    Seeds,
    Settings,
    Sigma,
    Steps,
    Target,
    compare_arms,
)
from peft import PeftModel
from transformers import Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from afaspec.capture.target_model import load_tokenizer
from afaspec.cli.console import console
from afaspec.demo.run import cpp_headers
from afaspec.pairs.names import resolve_model
from bench.prompts.read import read_prompts
from bench.records.settings import PromptSettings
from drafts.errors import UserError


def main(
    out: Out = Path("runs/sft"),
    target: Target = "embedded",
    data: Annotated[
        str | None,
        typer.Option(help="Folder or JSONL of texts.", show_default="PyTorch's C++ headers"),
    ] = None,
    steps: Steps = 60,
    batch: Annotated[int, typer.Option(help="Texts of each step.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of each text.")] = 128,
    held_out: Annotated[int, typer.Option(help="Texts of each held-out part.")] = 64,
    seeds: Seeds = 3,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Learning rate to try, once for each.", show_default="1e-3 3e-3 1e-2"),
    ] = None,
    rank: Rank = 16,
    sigma: Sigma = "relu",
    end: End = 0.5,
) -> None:
    """Fine-tune a target on texts with LoRA and with AFA-LoRA, and say which came further.

    Examples

        python docs/examples/finetune_sft.py --out runs/sft

        python docs/examples/finetune_sft.py --out runs/mine --data FOLDER_OR_JSONL --seeds 5

        python docs/examples/finetune_sft.py --out runs/other --target MODEL --rate 1e-4
    """
    settings = Settings(
        target=target,
        data=data or str(cpp_headers()),
        steps=steps,
        seeds=seeds,
        rates=sorted(rate or [1e-3, 3e-3, 1e-2]),
        rank=rank,
        sigma=sigma,
        end=end,
        sizes={"batch": batch, "tokens": tokens, "held_out": held_out},
    )
    disable_progress_bars()  # those of preparing the texts, once for each run
    compare_arms(settings, supervised(settings, batch, tokens, held_out), out)


def supervised(settings: Settings, batch: int, tokens: int, held_out: int) -> Method:
    """SFTTrainer on the training side of the data, measured by the loss on the other side."""
    tokenizer = load_tokenizer(resolve_model(settings.target))

    def encoded(texts: list[str]) -> list[list[int]]:
        return [
            ids
            for ids in tokenizer(texts, truncation=True, max_length=tokens)["input_ids"]
            if len(ids) > 1
        ]

    train = encoded(texts_of(settings.data, "train", batch * settings.steps))
    evals = encoded(texts_of(settings.data, "eval", 2 * held_out))
    parts = {"validation": evals[0::2], "test": evals[1::2]}

    def trainer(model: PeftModel, shared: Json, callbacks: list[TrainerCallback]) -> Trainer:
        return SFTTrainer(
            model,
            SFTConfig(per_device_train_batch_size=batch, max_length=tokens, **shared),
            train_dataset=Dataset.from_dict({"input_ids": train}),
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def measure(model: Any, part: Part, seed: int) -> tuple[list[float], list[float]]:
        return summed_losses(model, parts[part]), [len(ids) - 1.0 for ids in parts[part]]

    return Method("loss", False, "loss", trainer, measure)


def texts_of(data: str, split: Any, limit: int) -> list[str]:
    """Texts of one side of the data, the same for every seed."""
    texts = [
        prompt.text
        for prompt in read_prompts(data, PromptSettings(split=split, limit=limit))
        if prompt.text
    ]
    if not texts:
        raise UserError("holds no plain text", where=data, hint="give source files")
    return texts


@torch.no_grad()
def summed_losses(model: Any, texts: list[list[int]], at_once: int = 16) -> list[float]:
    """Cross-entropy of the next token, summed over each text."""
    model.eval()
    found: list[float] = []
    for i in range(0, len(texts), at_once):
        rows = [torch.tensor(ids, device=model.device) for ids in texts[i : i + at_once]]
        pad = torch.nn.utils.rnn.pad_sequence
        ids = pad(rows, batch_first=True)
        labels = pad(rows, batch_first=True, padding_value=-100)[:, 1:]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        losses = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), labels, ignore_index=-100, reduction="none"
        )
        found += losses.sum(dim=1).tolist()
    return found


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        console.print(f"Error: {error}", markup=False)
        raise SystemExit(error.exit_code) from None
