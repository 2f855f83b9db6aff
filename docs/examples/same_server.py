"""One server, measured by `afaspec bench`, `vllm bench serve` and guidellm in turns: do they agree?

    afaspec serve embedded --draft embedded-draft --port 8123
    python docs/examples/same_server.py --url http://127.0.0.1:8123 --model embedded \
        --prompts prompts.jsonl --guidellm guidellm --out runs/same-server

The same texts, one request at a time, greedy, as many tokens. Every tool runs in a process of its
own, in another order each time; the server's counters are read before and after it. guidellm is
left out where it is not given (`pip install guidellm`, in an environment of its own).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from afaspec.pairs.names import resolve_model
from bench.interchange.read import read_any
from bench.report.schema import Report
from serving.remote import connect

VLLM = (
    "from vllm.benchmarks.serve import add_cli_args, main\n"
    "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
    "parser = FlexibleArgumentParser()\nadd_cli_args(parser)\nmain(parser.parse_args())"
)
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")


def main(
    prompts: Annotated[Path, typer.Option(help='JSONL with a text each: {"prompt": ...}')],
    url: str = "http://127.0.0.1:8123",
    model: str = "embedded",
    tokens: int = 48,
    times: int = 3,
    guidellm: Annotated[str | None, typer.Option(help="its command")] = None,
    out: Path = Path("runs/same-server"),
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    count = sum(1 for line in prompts.read_text().splitlines() if line.strip())
    folder = str(resolve_model(model))
    tools: dict[str, Callable[[Path], tuple[list[str], Path]]] = {
        "afaspec bench": lambda at: _ours(at, url, prompts, tokens),
        "vllm bench serve": lambda at: _vllm(at, url, model, folder, prompts, tokens, count),
    }
    if guidellm:
        tools["guidellm"] = lambda at: _guidellm(
            at, guidellm, url, model, folder, prompts, tokens, count
        )
    found: dict[str, list[Report]] = {name: [] for name in tools}
    counted: dict[str, list[str]] = {name: [] for name in tools}
    server = connect(url)
    for turn in range(times):
        for name in random.Random(turn).sample(list(tools), len(tools)):
            at = out / f"{name.replace(' ', '-')}-{turn + 1}"
            at.mkdir(exist_ok=True)
            command, result = tools[name](at)
            before = server.counters()
            with (at / "log").open("w") as log:
                subprocess.run(command, stdout=log, stderr=log, check=True)
            spent = (server.settled_counters(before.requests + count) - before).spec
            found[name].append(read_any(result).report)
            counted[name].append(
                f"{spent.drafts:,} drafts, {spent.accepted_tokens:,} accepted "
                f"{list(spent.accepted_per_position)}"
            )
            print(f"{name} {turn + 1}: {counted[name][-1]}", file=sys.stderr, flush=True)
    _show(found, counted)


def _ours(at: Path, url: str, prompts: Path, tokens: int) -> tuple[list[str], Path]:
    command = [
        sys.executable, "-m", "afaspec", "bench", "--url", f"server={url}", "--prompts",
        str(prompts), "--max-tokens", str(tokens), "--ignore-eos", "--rounds", "1", "--warmup", "0",
        "--out", str(at),
    ]  # fmt: skip
    return command, at


def _vllm(
    at: Path, url: str, model: str, folder: str, prompts: Path, tokens: int, count: int
) -> tuple[list[str], Path]:
    command = [
        sys.executable, "-c", VLLM, "--backend", "openai", "--base-url", url, "--endpoint",
        "/v1/completions", "--model", model, "--tokenizer", folder, "--dataset-name", "custom",
        "--dataset-path", str(prompts), "--custom-output-len", str(tokens), "--skip-chat-template",
        "--num-prompts", str(count), "--max-concurrency", "1", "--temperature", "0", "--ignore-eos",
        "--disable-shuffle", "--num-warmups", "0", "--ready-check-timeout-sec", "0",
        "--save-result", "--save-detailed", "--result-dir", str(at),
        "--result-filename", "result.json",
    ]  # fmt: skip
    return command, at / "result.json"


def _guidellm(
    at: Path,
    program: str,
    url: str,
    model: str,
    folder: str,
    prompts: Path,
    tokens: int,
    count: int,
) -> tuple[list[str], Path]:
    scenario = {
        "metadata": {"name": "same-server"},
        "spec": {
            "backend": {
                "kind": "openai_http",
                "target": url,
                "model": model,
                "request_format": "/v1/completions",
                "max_tokens": tokens,
                "extras": {"body": {"temperature": 0, "ignore_eos": True}},
            },
            "profile": {"kind": "synchronous"},
            "constraints": [{"kind": "max_requests", "count": count}],
            "tokenizer": {"kind": "hf_auto", "model": folder},
            "data": [{"kind": "json_file", "path": str(prompts)}],
            "outputs": [{"kind": "json", "path": str(at / "result.json")}],
        },
    }
    (at / "scenario.json").write_text(json.dumps(scenario))
    command = [program, "run", "-c", str(at / "scenario.json"), "--disable-console-interactive"]
    return command, at / "result.json"


def _show(found: dict[str, list[Report]], counted: dict[str, list[str]]) -> None:
    table = Table("", *found, title="Median over requests, in ms; the range over repetitions")
    for kind in LATENCIES:
        cells = []
        for reports in found.values():
            seen = [report.arms[0]["latency"][kind] for report in reports]
            values = [one["p50"] for one in seen if one]
            cells.append(_span(values) if values else "not kept")
        table.add_row(kind.removesuffix("_ms").upper(), *cells)
    rates = []
    for reports in found.values():
        values = [one.arms[0]["throughput_tokens_per_second"]["value"] for one in reports]
        rates.append(_span(values))
    table.add_row("tokens/s", *rates)
    Console(width=130).print(table)
    every = {one for of_tool in counted.values() for one in of_tool}
    same = "the same each time" if len(every) == 1 else "NOT the same"
    print(f"The server's counters: {same}: {'; '.join(sorted(every))}")


def _span(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ({min(values):.1f} to {max(values):.1f})"


if __name__ == "__main__":
    typer.run(main)
