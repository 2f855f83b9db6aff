"""Adapt a draft of every family to one domain and measure all of them: docs/families.md's table.

Bases learn from the embedded target's Python completions (EAGLE-3's is the embedded draft). Each is
adapted to C++ headers by LoRA, AFA-LoRA and full fine-tuning: same data, order and steps, each with
the learning rate that did best on held-out training prompts. vLLM serves them on other prompts.

    python docs/examples/families.py --out runs/families
    python docs/examples/families.py --out runs/families --families eagle --families medusa

Every stage leaves its result in the folder: a second run goes on where the first one stopped.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from afaspec.capture.adapted_target import open_target
from afaspec.capture.config import CaptureConfig
from afaspec.capture.run import capture
from afaspec.checkpoints.config import InitConfig
from afaspec.checkpoints.init import init_checkpoint
from afaspec.checkpoints.merge import merge
from afaspec.cli.console import console, progress
from afaspec.demo.run import cpp_headers
from afaspec.pairs.names import open_draft
from afaspec.store.read import FeatureStore
from afaspec.train.config import Arm as ArmName
from afaspec.train.config import TrainConfig
from afaspec.train.run import train
from bench.engine.run import run_bench
from bench.records.acceptance import Acceptance
from bench.records.arms import Arm
from bench.records.config import BenchConfig
from bench.records.speeds import DECODE
from bench.report.console import stage_bars
from bench.report.files import read_report, write_report
from bench.stats.offline import offline_acceptance
from drafts.files import atomic_folder, read_json, write_json
from drafts.registry import FAMILIES, load_draft, read_draft
from drafts.target.info import TargetInfo

K = 3
RANK = 32
FIXED_K = ("medusa", "dflash", "dspark")  # made for a number of tokens
# Those that vLLM serves for the embedded target, which brings no MTP layer; DSpark's needs a GPU.
SERVED = [name for name in FAMILIES if name not in ("mtp", "dspark")]
RATES: dict[ArmName, tuple[float, ...]] = {
    "lora": (3e-3, 6e-3),
    "afa-lora": (3e-3, 6e-3),
    "full": (3e-4, 1e-3),
}
Stage = Callable[[str, int, int], None]


def main(
    out: Annotated[Path, typer.Option(help="Folder of all results.")] = Path("runs/families"),
    families: Annotated[
        list[str] | None, typer.Option(help="Families [default: all served].")
    ] = None,
    python_store: Annotated[Path | None, typer.Option(help="Python completions there are.")] = None,
    base_steps: Annotated[int, typer.Option(help="Steps of each base from scratch.")] = 300,
    steps: Annotated[int, typer.Option(help="Steps of each arm.")] = 120,
    tuning_steps: Annotated[int, typer.Option(help="Steps of each learning rate tried.")] = 30,
    prompts: Annotated[int, typer.Option(help="Prompts measured in vLLM.")] = 20,
) -> None:
    """Train, merge and measure drafts of every family on the embedded target."""
    target = open_target("embedded")
    with progress() as bars:
        stage = stage_bars(bars)
        python = python_store or answers(out, target, sysconfig.get_path("stdlib"), 1000, stage)
        learn = answers(out, target, str(cpp_headers()), 320, stage, split="train")
        held = answers(out, target, str(cpp_headers()), prompts, stage, split="eval")
        for family in families or SERVED:
            drafts = {"base": base_draft(out, family, target, python, base_steps, stage)}
            for arm in RATES:
                drafts[arm] = adapted(
                    out / family, arm, target, drafts["base"], learn, steps, tuning_steps, stage
                )
            offline = {
                name: offline_acceptance(
                    load_draft(read_draft(folder), target), FeatureStore.open(held), K
                )
                for name, folder in drafts.items()
            }
            measured(out / family / "report", target, drafts, prompts, stage, offline=offline)
            write_json(
                out / family / "agreement.json",
                {
                    name: agreement(out / family / "report", name, held, found)
                    for name, found in offline.items()
                },
            )
        done = {f: out / f / "afa-lora-merged" for f in SERVED if (out / f / "report").exists()}
        measured(
            out / ("all-" + "-".join(done)), target, done, prompts, stage, rounds=2, eager=False
        )
    table = rows(out, list(done))
    write_json(out / "families.json", table)
    console.print(markdown(table), markup=False, highlight=False, soft_wrap=True)


def answers(
    out: Path,
    target: TargetInfo,
    data: str,
    limit: int,
    stage: Stage,
    split: Literal["train", "eval"] = "train",
) -> Path:
    """A store of the target's answers, with the states that any family may read."""
    folder = out / f"store-{Path(data).name}-{split}"
    capture(
        CaptureConfig(
            target=str(target.folder),
            prompts=data,
            out=folder,
            layer_ids="2,6,9",
            split=split,
            limit=limit,
            prompt_tokens=96,
            max_new_tokens=128,
        ),
        target,
        on_progress=lambda now: stage(f"answers, {Path(data).name}", int(now.done), now.total),
    )
    return folder


def base_draft(
    out: Path, family: str, target: TargetInfo, store: Path, steps: int, stage: Stage
) -> Path:
    """A draft trained from scratch on the store; EAGLE-3's is the embedded one."""
    if family == "eagle3":
        return open_draft("embedded-draft").folder
    start, run, merged = (out / family / name for name in ("start", "base-run", "base"))
    if not start.exists():
        heads = K if family in FIXED_K else None
        config = InitConfig(family=family, target=target.folder, out=start, heads=heads)
        init_checkpoint(config, target, note=lambda text: None)
    if not merged.exists():
        fresh = read_draft(start)
        train(
            TrainConfig(
                store=store,
                draft=start,
                out=run,
                target=target.folder,
                arm="full",
                lm_head="lm_head.weight" not in fresh.shared,
                steps=steps,
                learning_rate=1e-3,
                draft_steps=K,
                eval_every=100,
            ),
            FeatureStore.open(store),
            fresh,
            target,
            lambda row: stage(f"{family}: base", row["step"], steps),
        )
        merge(run, fresh, merged, target)
    return merged


def adapted(
    out: Path,
    arm: ArmName,
    target: TargetInfo,
    base: Path,
    store: Path,
    steps: int,
    tuning: int,
    stage: Stage,
) -> Path:
    """The base adapted by one arm at its own learning rate, merged."""
    merged = out / f"{arm}-merged"
    if merged.exists():
        return merged

    opened, draft = FeatureStore.open(store), read_draft(base)

    def run(rate: float, count: int) -> Any:
        return train(
            TrainConfig(
                store=store,
                draft=base,
                out=out / f"{arm}-{count}-{rate:g}",
                arm=arm,
                rank=RANK,
                init="default",  # as in docs/families.md
                steps=count,
                learning_rate=rate,
                draft_steps=K,
                eval_every=min(count, 40),
            ),
            opened,
            draft,
            target,
            lambda row: stage(f"{out.name}: {arm}, {rate:g}", row["step"], count),
        )

    tries = {rate: run(rate, tuning).length for rate in RATES[arm]}
    best = max(tries, key=lambda rate: tries[rate])
    trained = run(best, steps)
    write_json(out / f"{arm}.json", {"tries": tries, "learning_rate": best})
    merge(trained.folder, draft, merged, target)
    return merged


def measured(
    out: Path,
    target: TargetInfo,
    drafts: dict[str, Path],
    prompts: int,
    stage: Stage,
    rounds: int = 1,
    eager: bool = True,
    offline: Any = None,
) -> None:
    """A vLLM comparison of the drafts with no speculation, written to `out` once."""
    if out.exists():
        return
    report = run_bench(
        BenchConfig(
            target=target,
            prompts=str(cpp_headers()),
            arms=(Arm("none"), *(Arm(name, read_draft(folder)) for name, folder in drafts.items())),
            k=K,
            max_tokens=128,
            rounds=rounds,
            limit=prompts,
            split="eval",
            prompt_tokens=96,
            enforce_eager=eager,
        ),
        stage,
        offline=offline,
        log_folder=out.parent / "logs",
    )
    with atomic_folder(out) as folder:
        write_report(report, folder)


def agreement(report: Path, arm: str, held: Path, offline: Acceptance) -> dict[str, float]:
    """Acceptance length in vLLM and offline, over the prompts that both engines answered alike.

    transformers and vLLM round differently; at a near-tie an answer takes another course, and what
    is accepted along it is no longer comparable.
    """
    measured = read_json(report / "measurements.json")["arms"][arm]
    store, drafts, accepted = FeatureStore.open(held), [0, 0], [0, 0]
    alike = 0
    for i in range(len(store)):
        sequence = store[i]
        prompt = sequence.prompt_index
        if sequence.input_ids[sequence.loss_mask].tolist() != measured["outputs"][prompt]:
            continue
        alike += 1
        counted = measured["counters"][0][prompt]
        for place, (steps, tokens) in enumerate(
            (
                (counted["drafts"], counted["accepted_tokens"]),
                (offline.drafts_per_prompt[i], offline.accepted_per_prompt[i].sum()),
            )
        ):
            drafts[place] += int(steps)
            accepted[place] += int(tokens)
    vllm, walked = (1 + a / d for a, d in zip(accepted, drafts, strict=True))
    return {"prompts": alike, "vllm": vllm, "offline": walked}


def rows(out: Path, families: list[str]) -> list[dict[str, Any]]:
    """One row per family: each arm's acceptance, and the speed of its AFA-LoRA draft."""
    together = read_report(out / ("all-" + "-".join(families)) / "report.json")
    table = []
    for family in families:
        report = read_report(out / family / "report" / "report.json")
        arms = {arm["name"]: arm for arm in report.arms if arm["name"] != "none"}
        table.append(
            {
                "family": family,
                "acceptance_length": {n: arm["acceptance_length"] for n, arm in arms.items()},
                "agreement": read_json(out / family / "agreement.json"),
                "learning_rate": {
                    arm: read_json(out / family / f"{arm}.json")["learning_rate"] for arm in RATES
                },
                **{key: together.arm(family)[key] for key in (DECODE.rate, DECODE.speedup)},
            }
        )
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """The table of docs/families.md."""
    arms = ("base", *RATES)
    titles = ["base", "LoRA", "AFA-LoRA", "full", "AFA-LoRA tokens/s", "speedup"]
    lines = ["| family | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for row in table:
        cells = [FAMILIES[row["family"]].title]
        cells += [f"{interval(row['acceptance_length'][arm])}" for arm in arms]
        cells += [f"{row[DECODE.rate]['value']:.0f}", interval(row[DECODE.speedup])]
        lines.append("| " + " | ".join(cells) + " |")
    pairs = [row["agreement"][arm] for row in table for arm in arms]
    apart = max(abs(pair["offline"] / pair["vllm"] - 1) for pair in pairs)
    fewest = min(pair["prompts"] for pair in pairs)
    return "\n".join(
        [
            *lines,
            "",
            f"Over the prompts that transformers and vLLM answer alike ({fewest} or more of each), "
            f"acceptance length offline and in vLLM differs by at most {apart:.1%}.",
        ]
    )


def interval(figure: dict[str, float]) -> str:
    return f"{figure['value']:.2f} ({figure['low']:.2f} to {figure['high']:.2f})"


if __name__ == "__main__":
    typer.run(main)
