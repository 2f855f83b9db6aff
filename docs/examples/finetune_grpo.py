"""Reinforcement learning of a target with TRL's GRPOTrainer: LoRA against AFA-LoRA.

The embedded target is given the head of a Python function and writes its body. A program rewards
it: the body is parsed, never run, and each statement counts that says something new and uses only
names that exist. Measured is the reward of bodies for functions of other files.

    python docs/examples/finetune_grpo.py --out runs/grpo
    python docs/examples/finetune_grpo.py --out runs/mine --data FOLDER_OF_PYTHON --seeds 5
    python docs/examples/finetune_grpo.py --out runs/other --target MODEL_FOLDER --rate 1e-4

What is compared, and how, is in finetune_arms.py. A second call goes on where the first one
stopped.
"""

from __future__ import annotations

import ast
import builtins
import hashlib
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from datasets import Dataset
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
from trl import GRPOConfig, GRPOTrainer

from afaspec.capture.target_model import load_tokenizer
from afaspec.cli.console import console
from afaspec.pairs.names import resolve_model
from drafts.errors import UserError

ENOUGH = 4  # statements of a body that can count
TEMPERATURE = 0.7  # in training and measuring: at 1 the embedded target hardly writes a statement
TENTHS = {"validation": {0, 1}, "test": {2, 3}, "train": {4, 5, 6, 7, 8, 9}}  # of all files


def main(
    out: Out = Path("runs/grpo"),
    target: Target = "embedded",
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of Python files.", show_default="the standard library"),
    ] = None,
    steps: Steps = 20,
    prompts: Annotated[int, typer.Option(help="Functions of each step.")] = 2,
    group: Annotated[int, typer.Option(help="Bodies written for each of them.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens of a body.")] = 32,
    head_tokens: Annotated[int, typer.Option(help="Most tokens of a head.")] = 40,
    held_out: Annotated[int, typer.Option(help="Functions of each held-out part.")] = 48,
    samples: Annotated[int, typer.Option(help="Bodies for each of them in measuring.")] = 2,
    seeds: Seeds = 3,
    rate: Annotated[
        list[float] | None,
        typer.Option(help="Learning rate to try, once for each.", show_default="1e-3 3e-3 1e-2"),
    ] = None,
    rank: Rank = 16,
    sigma: Sigma = "relu",
    end: End = 0.5,
) -> None:
    """Train a target on a reward with LoRA and with AFA-LoRA, and say which came further.

    Examples

        python docs/examples/finetune_grpo.py --out runs/grpo

        python docs/examples/finetune_grpo.py --out runs/mine --data FOLDER_OF_PYTHON --seeds 5

        python docs/examples/finetune_grpo.py --out runs/other --target MODEL --rate 1e-4
    """
    sizes = {
        "prompts": prompts,
        "group": group,
        "tokens": tokens,
        "head_tokens": head_tokens,
        "held_out": held_out,
        "samples": samples,
    }
    settings = Settings(
        target=target,
        data=str(data or sysconfig.get_path("stdlib")),
        steps=steps,
        seeds=seeds,
        rates=sorted(rate or [1e-3, 3e-3, 1e-2]),
        rank=rank,
        sigma=sigma,
        end=end,
        sizes=sizes,
    )
    compare_arms(settings, rewarded(settings, sizes), out)


def rewarded(settings: Settings, sizes: dict[str, int]) -> Method:
    """GRPOTrainer on heads of functions, measured by the reward on those of other files."""
    tokenizer = load_tokenizer(resolve_model(settings.target))
    tokenizer.padding_side = "left"
    counts = {
        "train": settings.steps * sizes["prompts"],
        "validation": sizes["held_out"],
        "test": sizes["held_out"],
    }
    heads = {
        part: heads_of(Path(settings.data), part, count, tokenizer, sizes["head_tokens"])
        for part, count in counts.items()
    }

    def trainer(model: PeftModel, shared: Json, callbacks: list[TrainerCallback]) -> Trainer:
        arguments = GRPOConfig(
            per_device_train_batch_size=sizes["prompts"] * sizes["group"],
            num_generations=sizes["group"],
            max_completion_length=sizes["tokens"],
            temperature=TEMPERATURE,
            **shared,
        )
        return GRPOTrainer(
            model,
            rewards,
            arguments,
            train_dataset=Dataset.from_dict({"prompt": heads["train"]}),
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def measure(model: Any, part: Part, seed: int) -> tuple[list[float], list[float]]:
        asked = [head for head in heads[part] for _ in range(sizes["samples"])]
        torch.manual_seed(seed)
        found = rewards(asked, written(model, tokenizer, asked, sizes["tokens"]))
        table = torch.tensor(found).view(len(heads[part]), sizes["samples"])
        return table.sum(dim=1).tolist(), [float(sizes["samples"])] * len(table)

    return Method("reward", True, "reward", trainer, measure)


def heads_of(data: Path, part: str, count: int, tokenizer: Any, most: int) -> list[str]:
    """Heads of functions of one part's files, chosen by their content, short enough, each once."""
    found = {
        head: hashlib.sha256(head.encode()).hexdigest()
        for path in sorted(data.rglob("*.py"))
        if not {"site-packages", "test", "tests"} & set(path.relative_to(data).parts)
        if digit_of(path.relative_to(data).as_posix()) in TENTHS[part]
        for head in function_heads(path)
    }
    heads = [
        head
        for head in sorted(found, key=lambda head: found[head])
        if len(tokenizer(head)["input_ids"]) <= most
    ][:count]
    if len(heads) < min(count, 2):
        raise UserError(
            f"has {len(heads)} functions with a docstring for the {part} part",
            where=data,
            hint="give a folder with more Python files",
        )
    return heads


def digit_of(name: str) -> int:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10


def function_heads(path: Path) -> Iterator[str]:
    """Signature and docstring of each function of a file that has both, unindented."""
    try:
        text = path.read_text(encoding="utf-8")
        tree = parsed(text)
    except (OSError, UnicodeDecodeError, SyntaxError, ValueError):
        return
    lines = text.splitlines()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and ast.get_docstring(node):
            end = node.body[0].end_lineno or node.lineno
            yield textwrap.dedent("\n".join(lines[node.lineno - 1 : end]))


def rewards(prompts: list[str], completions: list[str], **_: Any) -> list[float]:
    """The reward of each body, from 0 to 1, as TRL asks for it."""
    return [reward(head, body) for head, body in zip(prompts, completions, strict=True)]


def reward(head: str, body: str) -> float:
    """How many of the first statements, up to `ENOUGH`, are new and use only names that exist.

    Counted are statements that hold no others, in the longest beginning of the body that parses.
    """
    lines = own_lines(body)
    for end in range(len(lines), 0, -1):
        try:
            function = parsed(head + "\n".join(lines[:end]) + "\n").body[0]
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        known = names(function, ast.Store, ast.Del) | set(dir(builtins)) | {function.name}
        known |= {node.arg for node in ast.walk(function) if isinstance(node, ast.arg)}
        statements = {
            ast.dump(node): names(node, ast.Load)
            for node in ast.walk(function)
            if isinstance(node, ast.stmt) and not hasattr(node, "body")
            if node is not function.body[0]  # the docstring
        }
        return min(sum(used <= known for used in statements.values()), ENOUGH) / ENOUGH
    return 0.0


def own_lines(body: str) -> list[str]:
    """The lines that belong to the function: up to the next one at the margin.

    Where none comes, the last line is left out: it may have been cut by the limit of tokens.
    """
    lines = body.split("\n")
    for i, line in enumerate(lines):
        if line and not line[0].isspace():
            return lines[:i]
    return lines[:-1]


def names(tree: ast.AST, *contexts: type[ast.expr_context]) -> set[str]:
    """The names that are read (`ast.Load`) or bound (`ast.Store`) in a tree."""
    return {
        node.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and isinstance(node.ctx, contexts)
    }


def parsed(text: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        return ast.parse(text)


@torch.no_grad()
def written(
    model: Any, tokenizer: Any, heads: list[str], tokens: int, at_once: int = 64
) -> list[str]:
    """A body for each head, drawn as in training."""
    model.eval()
    bodies: list[str] = []
    for i in range(0, len(heads), at_once):
        batch = tokenizer(heads[i : i + at_once], return_tensors="pt", padding=True)
        ids = model.generate(
            input_ids=batch["input_ids"].to(model.device),
            attention_mask=batch["attention_mask"].to(model.device),
            max_new_tokens=tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=0,
            top_p=1.0,
        )
        new = ids[:, batch["input_ids"].shape[1] :]
        bodies += tokenizer.batch_decode(new, skip_special_tokens=True)
    return bodies


if __name__ == "__main__":
    try:
        typer.run(main)
    except UserError as error:
        console.print(f"Error: {error}", markup=False)
        raise SystemExit(error.exit_code) from None
