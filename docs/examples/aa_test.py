"""Does the benchmark call equal drafts different? And does it find a draft that is worse?

The embedded draft runs as two arms, over and over, each time on other prompts. Speed is compared
at temperature 0. Acceptance is compared at a temperature, with other seeds in each arm, because
greedy decoding would accept the very same tokens in both (a low one: the embedded target is small,
and far from 0 hardly anybody can guess what it draws). A third arm is the same draft with noise
added to its weights. At the 95% level the first two may be called different in one of 20 repeats,
and the third should be called worse in nearly all.

    python docs/examples/aa_test.py --out runs/aa
    python docs/examples/aa_test.py --out runs/aa-quick --repeats 1 --prompts 4 --max-tokens 8

Engines start anew every few repeats, because two processes of the same engine may differ too. Run
it on a machine that does nothing else.
"""

from __future__ import annotations

import random
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from afaspec.capture.adapted_target import open_target
from afaspec.cli.console import console, progress
from afaspec.pairs.names import open_draft
from bench.engine.measure import measure
from bench.prompts.load import load_prompts
from bench.records.arms import Arm
from bench.records.config import BenchConfig
from bench.records.progress import Progress
from bench.records.run import ArmRun
from bench.records.speeds import DECODE
from bench.report.console import stage_bars
from bench.stats.comparisons import quotient
from bench.stats.verdict import ACCEPTANCE, NO_DIFFERENCE, Comparison, compare
from drafts.errors import UserError
from drafts.files import atomic_folder, write_json
from drafts.registry import read_draft
from serving.engine.engine import EngineProcess, EngineSettings

FIRST, SECOND, NOISY = "first", "second", "noisy"
QUESTIONS = {
    "same draft, acceptance length": (SECOND, FIRST, ACCEPTANCE),
    "same draft, speed": (SECOND, FIRST, DECODE.rate),
    "noisy draft, acceptance length": (NOISY, FIRST, ACCEPTANCE),
}


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/aa"),
    repeats: Annotated[int, typer.Option(min=1, help="How often to compare.")] = 20,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts of each repeat.")] = 12,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds at temperature 0.")] = 2,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 48,
    temperature: Annotated[float, typer.Option(help="For the acceptance.")] = 0.3,
    noise: Annotated[float, typer.Option(help="Noise, as a share of each weight's spread.")] = 1.0,
    restart: Annotated[int, typer.Option(min=1, help="Repeats between starts of engines.")] = 5,
    seed: Annotated[int, typer.Option(help="Of prompts, noise and sampling.")] = 0,
) -> None:
    """Count verdicts between equal drafts, and against a worse one; prints a table."""
    target, draft = open_target("embedded"), open_draft("embedded-draft")
    noisy = with_noise(draft.folder, out / "noisy-draft", noise, seed)
    config = BenchConfig(
        target=target,
        prompts="suite:code@full",
        arms=(
            Arm(FIRST, draft),
            Arm(SECOND, draft),
            Arm(NOISY, read_draft(noisy)),
        ),
        rounds=rounds,
        max_tokens=max_tokens,
        ignore_eos=True,
        warmup=1,
    )
    pool = [prompt.input_ids for prompt in load_prompts(config)]
    if repeats * prompts > len(pool):
        raise UserError(
            f"{repeats} repeats of {prompts} prompts need more than the {len(pool)} there are",
            hint="give fewer --repeats or --prompts",
        )
    random.Random(seed).shuffle(pool)
    found: dict[str, list[Comparison]] = {question: [] for question in QUESTIONS}
    with progress() as bars:
        stage = stage_bars(bars)
        for first in range(0, repeats, restart):
            with ExitStack() as stack:
                engines = start(config, seed + first, pool, out / "logs", stack)
                for repeat in range(first, min(first + restart, repeats)):
                    chosen = pool[repeat * prompts : (repeat + 1) * prompts]
                    runs = one_repeat(config, engines, chosen, temperature, seed + repeat)
                    for question, (arm, against, metric) in QUESTIONS.items():
                        found[question].append(verdict(runs, arm, against, metric, config.block))
                    stage("repeats", repeat + 1, repeats)
                    write_json(out / "aa.json", as_json(found))
    console.print(table(found))


def with_noise(draft: Path, folder: Path, noise: float, seed: int) -> Path:
    """A copy of the draft whose matrices have normal noise of `noise` times their own spread."""
    import shutil

    import torch
    from safetensors.torch import load_file, save_file

    if folder.exists():
        shutil.rmtree(folder)
    generator = torch.Generator().manual_seed(seed)
    with atomic_folder(folder) as made:
        shutil.copytree(draft, made, dirs_exist_ok=True)
        for file in made.glob("*.safetensors"):
            tensors = load_file(file)
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and tensor.ndim == 2:
                    drawn = torch.randn(tensor.shape, generator=generator)
                    added = drawn * noise * tensor.float().std()
                    tensors[name] = (tensor.float() + added).to(tensor.dtype)
            save_file(tensors, file, metadata={"format": "pt"})
    return folder


def start(
    config: BenchConfig, seed: int, pool: list[list[int]], logs: Path, stack: ExitStack
) -> dict[str, EngineProcess]:
    """An engine for each arm, each with a seed of its own."""
    longest = max(map(len, pool)) + config.max_tokens + config.k + 1
    engines = {}
    for number, arm in enumerate(config.arms):
        settings = EngineSettings(
            config.target,
            arm.drafter,
            k=config.k,
            seed=1000 * seed + number,
            max_model_len=longest,
            enforce_eager=True,
        )
        engine = EngineProcess(settings, logs / f"{arm.name}.log", wait=False)
        engines[arm.name] = stack.enter_context(engine)
    for engine in engines.values():
        engine.wait_ready()
    return engines


def one_repeat(
    config: BenchConfig,
    engines: dict[str, EngineProcess],
    prompts: list[list[int]],
    temperature: float,
    seed: int,
) -> dict[str, dict[str, ArmRun]]:
    """The arms' runs by metric: speed at temperature 0, acceptance at `temperature`."""

    def run(arms: tuple[Arm, ...], rounds: int, at: float) -> dict[str, ArmRun]:
        for engine in engines.values():
            engine.temperature = at
        quiet: Progress = lambda stage, done, total: None  # noqa: E731
        once = config.model_copy(update={"arms": arms, "rounds": rounds, "seed": seed})
        return {run.arm.name: run for run in measure(once, once.arms, engines, prompts, quiet)}

    return {
        DECODE.rate: run(config.arms[:2], config.rounds, 0.0),
        ACCEPTANCE: run(config.arms, 1, temperature),
    }


def verdict(
    runs: dict[str, dict[str, ArmRun]], arm: str, against: str, metric: str, block: int
) -> Comparison:
    """One comparison, by itself: nothing is corrected for others."""
    tables = [quotient(runs[metric][name], metric) for name in (arm, against)]
    assert tables[0] is not None
    assert tables[1] is not None
    return compare(arm, against, metric, tables[0], tables[1], block)


def as_json(found: dict[str, list[Comparison]]) -> dict[str, Any]:
    return {
        question: {
            "repeats": len(comparisons),
            "different": different(comparisons),
            "comparisons": [comparison.as_json() for comparison in comparisons],
        }
        for question, comparisons in found.items()
    }


def different(comparisons: list[Comparison]) -> int:
    return sum(comparison.verdict != NO_DIFFERENCE for comparison in comparisons)


def table(found: dict[str, list[Comparison]]) -> Table:
    """A row per question: how often the arms were called different, and by how much they differ."""
    made = Table("compared", "called different", "mean difference", "smallest p")
    for question, comparisons in found.items():
        changes = [comparison.relative.value for comparison in comparisons]
        made.add_row(
            question,
            f"{different(comparisons)} of {len(comparisons)}",
            f"{100 * sum(changes) / len(changes):+.2f}%",
            f"{min(comparison.p_value for comparison in comparisons):.3g}",
        )
    return made


if __name__ == "__main__":
    typer.run(main)
