"""How stale a draft gets when its target is fine-tuned, and how much adapting it wins back.

A draft in good health is needed first: the embedded draft is adapted to what the embedded
target answers on C++ headers. Then the target is fine-tuned by LoRA, on the same headers.
The draft is measured on the target as it was and as it is now, adapted once more, to the fine-tuned
target, and measured again: offline, at temperature 0, on the same held-out prompts, which each
target answers in its own way.

    python docs/examples/stale_draft.py --out runs/stale
    python docs/examples/stale_draft.py --out runs/mine --data FOLDER_OR_JSONL --tune-steps 400

Every stage leaves its result in the folder: a second run goes on where the first one stopped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.console import Console
from rich.table import Table

from afaspec.capture.adapted_target import open_target
from afaspec.capture.config import CaptureConfig
from afaspec.capture.run import capture
from afaspec.capture.target_model import load_model, load_tokenizer
from afaspec.checkpoints.merge import merge
from afaspec.cli.console import console, note, progress
from afaspec.demo.run import cpp_headers
from afaspec.pairs.names import open_draft
from afaspec.store.read import FeatureStore
from afaspec.train.config import TrainConfig
from afaspec.train.run import train
from bench.prompts.read import read_prompts
from bench.records.settings import PromptSettings
from bench.stats.offline import offline_acceptance
from bench.stats.resample import Resampler, figure, resample_acceptance
from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.files import atomic_folder, read_json, write_json
from drafts.registry import load_draft, read_draft
from drafts.target.info import TargetInfo
from drafts.tensors import has_bf16

K = 3
HELD_OUT_TEXTS = 32  # for the target's loss before and after
Stage = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What the results depend on. Sizes are in prompts, tokens and optimizer steps."""

    target: str
    draft: str
    data: str
    prompts: str
    tune_steps: int
    tune_rate: float
    tune_rank: int
    tune_tokens: int
    train_prompts: int
    eval_prompts: int
    new_tokens: int
    steps: int
    learning_rate: float | None
    rank: int
    seed: int


def main(
    out: Annotated[Path, typer.Option(help="Folder of all results.")] = Path("runs/stale"),
    target: Annotated[str, typer.Option(help="Target to fine-tune.")] = "embedded",
    draft: Annotated[str, typer.Option(help="Its draft.")] = "embedded-draft",
    data: Annotated[
        str | None,
        typer.Option(help="Folder or JSONL to fine-tune on.", show_default="PyTorch's C++ headers"),
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(help="What the targets answer.", show_default="as --data"),
    ] = None,
    tune_steps: Annotated[int, typer.Option(help="Steps of fine-tuning the target.")] = 200,
    tune_rate: Annotated[float, typer.Option(help="Peak learning rate of fine-tuning.")] = 1e-3,
    tune_rank: Annotated[int, typer.Option(help="LoRA rank of fine-tuning.")] = 32,
    tune_tokens: Annotated[int, typer.Option(help="Tokens of each text of fine-tuning.")] = 256,
    train_prompts: Annotated[int, typer.Option(help="Prompts to adapt the draft on.")] = 320,
    eval_prompts: Annotated[int, typer.Option(help="Other prompts, to measure on.")] = 60,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 128,
    steps: Annotated[int, typer.Option(help="Steps of adapting the draft.")] = 240,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate of adapting.", show_default="as afaspec train")
    ] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank of the draft's adapter.")] = 32,
    seed: Annotated[int, typer.Option(help="Of data order and weights.")] = 0,
) -> None:
    """Adapt a draft, fine-tune its target, watch the draft go stale, adapt it again; print all."""
    data = data or str(cpp_headers())
    settings = Settings(
        target=target,
        draft=draft,
        data=data,
        prompts=prompts or data,
        tune_steps=tune_steps,
        tune_rate=tune_rate,
        tune_rank=tune_rank,
        tune_tokens=tune_tokens,
        train_prompts=train_prompts,
        eval_prompts=eval_prompts,
        new_tokens=new_tokens,
        steps=steps,
        learning_rate=learning_rate,
        rank=rank,
        seed=seed,
    )
    claim(settings, out)
    with progress() as bars:
        tasks: dict[str, Any] = {}

        def stage(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.update(tasks[name], completed=done)

        result = run(settings, out, stage)
    write_json(out / "result.json", {"settings": asdict(settings), **result})
    show(result)


def claim(settings: Settings, out: Path) -> None:
    """Record the settings in the folder, or check that they are those recorded there."""
    path = out / "settings.json"
    if not path.exists():
        write_json(path, asdict(settings))
    elif read_json(path) != asdict(settings):
        raise UserError("holds results of other settings", where=out, hint="choose another --out")


def run(settings: Settings, out: Path, stage: Stage) -> dict[str, Any]:
    """All stages; what they measured, by name."""
    original, shipped = open_target(settings.target), open_draft(settings.draft)
    store = captured(settings, original, shipped, "train", out / "train-original", stage)
    before = captured(settings, original, shipped, "eval", out / "eval-original", stage)
    fresh = adapted_draft(settings, original, shipped, store, out / "fresh", stage)

    adapter = out / "target-adapter"
    losses = fine_tune(settings, original.folder, adapter, stage)
    tuned = open_target(original.folder, adapter, note)
    after = captured(settings, tuned, fresh, "eval", out / "eval-tuned", stage)
    store = captured(settings, tuned, fresh, "train", out / "train-tuned", stage)
    adapted = adapted_draft(settings, tuned, fresh, store, out / "adapted", stage)

    return {
        "target_loss": losses,
        "acceptance": {
            "shipped": measured("measuring, as shipped", shipped, original, before, stage),
            "before": measured("measuring, original", fresh, original, before, stage),
            "after": measured("measuring, fine-tuned", fresh, tuned, after, stage),
            "adapted": measured("measuring, adapted", adapted, tuned, after, stage),
        },
    }


def fine_tune(settings: Settings, target: Path, adapter: Path, stage: Stage) -> dict[str, float]:
    """LoRA on the training side of the data; the loss on the other side before and after."""
    if (adapter / "losses.json").exists():
        return dict(read_json(adapter / "losses.json"))
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(settings.seed)
    texts = encoded(settings, target, "train", settings.tune_steps * 8)
    held_out = encoded(settings, target, "eval", HELD_OUT_TEXTS)
    model = get_peft_model(
        load_model(target, "float32"),
        LoraConfig(
            r=settings.tune_rank, lora_alpha=2 * settings.tune_rank, target_modules="all-linear"
        ),
    )
    losses = {"before": held_out_loss(model, held_out)}
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.tune_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.tune_rate, total_steps=settings.tune_steps, pct_start=0.1
    )
    model.train()
    for step in range(settings.tune_steps):
        picked = torch.randint(len(texts), (8,))
        loss = loss_of(model, [texts[i] for i in picked])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        stage(
            f"fine-tuning the target, loss {losses['before']:.2f} before",
            step + 1,
            settings.tune_steps,
        )
    losses["after"] = held_out_loss(model, held_out)
    with atomic_folder(adapter) as folder:
        model.save_pretrained(str(folder))
        write_json(folder / "losses.json", losses)
    return losses


def encoded(
    settings: Settings, target: Path, split: Literal["train", "eval"], limit: int
) -> list[torch.Tensor]:
    """Token ids of texts of one side of the data, each `tune_tokens` long at most."""
    tokenizer = load_tokenizer(target)
    prompts = read_prompts(
        settings.data, PromptSettings(split=split, limit=limit), seed=settings.seed
    )
    texts = [prompt.text or "" for prompt in prompts]
    ids = tokenizer(texts, truncation=True, max_length=settings.tune_tokens)["input_ids"]
    kept = [torch.tensor(row) for row in ids if len(row) > 1]
    if not kept:
        raise UserError("holds no plain text", where=settings.data, hint="give source files")
    return kept


def loss_of(model: Any, texts: list[torch.Tensor]) -> torch.Tensor:
    """Mean cross-entropy of the next token over right-padded texts."""
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(texts, batch_first=True)
    labels = pad(texts, batch_first=True, padding_value=-100)
    with torch.autocast("cpu", torch.bfloat16, enabled=has_bf16(torch.device("cpu"))):
        loss: torch.Tensor = model(input_ids=ids, labels=labels, use_cache=False).loss
    return loss


@torch.no_grad()
def held_out_loss(model: Any, texts: list[torch.Tensor]) -> float:
    model.eval()
    parts = [float(loss_of(model, texts[i : i + 8])) for i in range(0, len(texts), 8)]
    return sum(parts) / len(parts)


def captured(
    settings: Settings,
    target: TargetInfo,
    base: DraftInfo,
    split: Literal["train", "eval"],
    out: Path,
    stage: Stage,
) -> FeatureStore:
    """What the target answers to one split of the prompts."""
    config = CaptureConfig(
        target=str(target.folder),
        prompts=settings.prompts,
        out=out,
        draft=base.folder,
        split=split,
        limit=settings.train_prompts if split == "train" else settings.eval_prompts,
        prompt_tokens=96,
        max_new_tokens=settings.new_tokens,
        seed=settings.seed,
    )
    return capture(
        config,
        target,
        base,
        lambda now: stage(f"answers, {out.name}", int(now.done), now.total),
        note,
    )


def adapted_draft(
    settings: Settings,
    target: TargetInfo,
    base: DraftInfo,
    store: FeatureStore,
    out: Path,
    stage: Stage,
) -> DraftInfo:
    """The draft adapted to the target, as `afaspec train` does, and merged."""
    merged = out / "merged"
    if merged.exists():
        return read_draft(merged)
    config = TrainConfig(
        store=store.folder,
        draft=base.folder,
        out=out / "run",
        target=target.folder,
        rank=settings.rank,
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        draft_steps=K,
        eval_every=min(40, settings.steps),
        seed=settings.seed,
    )
    name = f"adapting the draft, {out.name}"
    trained = train(
        config, store, base, target, lambda row: stage(name, row["step"], settings.steps)
    )
    merge(trained.folder, base, merged, target)
    return read_draft(merged)


def measured(
    name: str, draft: DraftInfo, target: TargetInfo, store: FeatureStore, stage: Stage
) -> dict[str, Any]:
    """Acceptance length with its interval, and the acceptance at each position."""
    acceptance = offline_acceptance(load_draft(draft, target), store, K)
    samples = resample_acceptance(acceptance, Resampler(len(acceptance.drafts_per_prompt)))
    stage(name, 1, 1)
    return {
        "acceptance_length": figure(samples.length).as_json(),
        "acceptance_rate": figure(samples.rate).as_json(),
        "per_position": [figure(position).as_json() for position in samples.per_position],
    }


ROWS = {
    "shipped": "the draft as it ships",
    "before": "adapted to the target",
    "after": "after the target is fine-tuned",
    "adapted": "adapted to the fine-tuned target",
}


def show(result: dict[str, Any]) -> None:
    """The table, and the target's own gain."""
    table = Table(title=f"Offline acceptance of the draft, k = {K}", title_justify="left")
    for column in ("", "acceptance length", "95% interval", "acceptance by position"):
        table.add_column(column)
    for key, title in ROWS.items():
        row = result["acceptance"][key]
        length = row["acceptance_length"]
        table.add_row(
            title,
            f"{length['value']:.3f}",
            f"{length['low']:.3f} to {length['high']:.3f}",
            ", ".join(f"{position['value']:.3f}" for position in row["per_position"]),
        )
    Console().print(table)
    losses = result["target_loss"]
    note(f"Target's loss on held-out texts: {losses['before']:.3f}, then {losses['after']:.3f}")


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        console.print(f"Error: {error}", markup=False)
        raise SystemExit(error.exit_code) from None
