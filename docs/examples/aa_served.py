"""Does the benchmark call equal servers different, and does it find one that is 3% slower?

Two vLLM servers with one and the same draft are measured over and over, each time on other prompts,
at three loads (8 requests at once, 4 and 1). At the 95% level a load may call
them different in one of 20 repeats. The same measurements once more, with every time of the second
server's made 3% longer: how often that is found, beside how often the intervals say it should be.
The servers start anew every few repeats; one run of each start has the same prompts, and is held
against those of the other starts as `bench --gate` does, each start once for the new version.

    python docs/examples/aa_served.py --out runs/aa-served
    python docs/examples/aa_served.py --out runs/aa-quick --repeats 2 --restart 1 --prompts 4

It goes on where it was stopped. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from scipy.stats import norm

from afaspec.capture.adapted_target import open_target
from afaspec.cli.console import console, progress
from afaspec.pairs.names import open_draft
from bench.records.arms import Arm
from bench.records.run import Answer, Block
from bench.report.console import stage_bars
from bench.report.files import write_report
from bench.report.schema import Report
from bench.runs.across import compare_arm, repeats_of
from bench.runs.saved import read_run
from bench.server.arrivals import parse_loads
from bench.server.config import ServerConfig
from bench.server.measure import LoadRun, measure_servers
from bench.server.requests import Request, load_requests
from bench.server.run import connect_all, finish
from bench.stats.verdict import ACCEPTANCE, NO_DIFFERENCE
from drafts.errors import UserError
from serving.server.process import ServerProcess, ServerSettings

FIRST, SECOND = "first", "second"
K = 3
Json = dict[str, Any]


def main(
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("runs/aa-served"),
    repeats: Annotated[int, typer.Option(min=1, help="How often to compare.")] = 20,
    prompts: Annotated[int, typer.Option(min=2, help="Prompts of each repeat.")] = 8,
    rounds: Annotated[int, typer.Option(min=2, help="Rounds of each repeat.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens per answer.")] = 24,
    restart: Annotated[int, typer.Option(min=1, help="Repeats between starts of servers.")] = 4,
    slower: Annotated[float, typer.Option(help="What is planted.")] = 0.03,
    seed: Annotated[int, typer.Option(help="Of prompts and orders.")] = 0,
) -> None:
    """Count verdicts between equal servers, and those that find a slower one; prints tables."""
    arms = {name: Arm(name, open_draft("embedded-draft")) for name in (FIRST, SECOND)}
    config = ServerConfig(
        target=open_target("embedded"),
        prompts="suite:code@full",
        loads=parse_loads("8,4,1", None),
        rounds=rounds,
        max_tokens=max_tokens,
        ignore_eos=True,
        seed=seed,
    )
    pool = load_requests(config, None, K)
    random.Random(seed).shuffle(pool)
    if (repeats + 1) * prompts > len(pool):
        raise UserError(
            f"{repeats} repeats of {prompts} prompts need more than the {len(pool)} there are",
            hint="give fewer --repeats or --prompts",
        )
    kept = out / "comparisons.jsonl"
    rows = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
    done = {row["repeat"] for row in rows}
    with progress() as bars:
        stage = stage_bars(bars)
        for start in range(0, repeats, restart):
            common = out / "starts" / str(start)
            wanted = [r for r in range(start, min(start + restart, repeats)) if r not in done]
            if not wanted and (common / "report.json").exists():
                continue
            with started(config, arms, pool, out / "logs") as urls:
                servers = connect_all(config, urls)
                if not (common / "report.json").exists():
                    chosen = pool[:prompts]
                    results = measure_servers(config, servers, chosen, stage)
                    report = finish(config, results, servers, chosen, arms, (None, None), {})
                    write_report(report, common)
                for repeat in wanted:
                    chosen = pool[(repeat + 1) * prompts : (repeat + 2) * prompts]
                    once = config.model_copy(update={"seed": seed + repeat})
                    equal = measure_servers(once, servers, chosen, stage)
                    late = [[later(run, slower) for run in runs] for runs in equal]
                    found: list[Json] = []
                    for planted, results in ((False, equal), (True, late)):
                        report = finish(once, results, servers, chosen, arms, (None, None), {})
                        found += read_off(report, repeat, planted=planted)
                    rows += found
                    with kept.open("a") as file:
                        file.write("".join(json.dumps(row) + "\n" for row in found))
                    stage("repeats", repeat + 1, repeats)
    console.print(table(rows, slower))
    console.print(across_starts([read_run(path).report for path in sorted(out.glob("starts/*"))]))


@contextmanager
def started(
    config: ServerConfig, arms: dict[str, Arm], pool: Sequence[Request], logs: Path
) -> Iterator[dict[str, str]]:
    """The addresses of the two servers while they run."""
    assert config.target is not None
    longest = max(len(request.prompt or ()) for request in pool) + config.max_tokens + K + 1
    own = ("--enforce-eager", "--max-model-len", str(longest))
    with ExitStack() as stack:
        servers = {
            name: stack.enter_context(
                ServerProcess(
                    ServerSettings(
                        config.target,
                        arm.drafter,
                        K,
                        port=0,
                        own_args=own,
                        log=logs / f"{name}.log",
                    )
                )
            )
            for name, arm in arms.items()
        }
        for server in servers.values():
            server.wait_ready()
        yield {name: server.url for name, server in servers.items()}


def later(run: LoadRun, share: float) -> LoadRun:
    """The second server's run with every time longer by `share`; the first's as it is."""
    if run.name == FIRST:
        return run
    return replace(run, rounds=[[_longer(block, share) for block in row] for row in run.rounds])


def _longer(block: Block, share: float) -> Block:
    def slow(answer: Answer) -> Answer:
        chunks = [answer.sent + (chunk - answer.sent) * (1 + share) for chunk in answer.chunks]
        return replace(answer, chunks=chunks)

    return replace(
        block,
        wall_seconds=block.wall_seconds * (1 + share),
        answers=[slow(answer) for answer in block.answers],
    )


def read_off(report: Report, repeat: int, *, planted: bool) -> list[Json]:
    """The comparisons of all loads, as they stand in the report."""
    rows = []
    for step in report.load or []:
        load = f"{step['concurrency']} at once"
        rows += [
            {
                "repeat": repeat,
                "load": load,
                "planted": planted,
                "metric": "acceptance" if one["metric"] == ACCEPTANCE else "speed",
                "relative": one["relative"],
                "p_value": one["p_value"],
                "different": one["verdict"] != NO_DIFFERENCE,
            }
            for one in step["comparisons"]
        ]
    return rows


def table(rows: list[Json], slower: float) -> Table:
    """By load: false verdicts, planted ones found, and how often intervals so wide find them."""
    made = Table("load", "equal, called different", f"{slower:.0%} slower, found", "stated power")
    for load in dict.fromkeys(row["load"] for row in rows):
        of = [row for row in rows if row["load"] == load and row["metric"] == "speed"]
        equal = [row for row in of if not row["planted"]]
        hurt = [row for row in of if row["planted"]]
        powers = [power(row["relative"], slower) for row in equal if row["relative"]["low"]]
        made.add_row(
            load,
            f"{sum(row['different'] for row in equal)} of {len(equal)}",
            f"{sum(row['different'] for row in hurt)} of {len(hurt)}",
            f"{sum(powers) / len(powers):.0%}" if powers else "no verdicts",
        )
    return made


def power(relative: Json, slower: float) -> float:
    """How often a difference of `slower` is found with an interval as wide as this one."""
    error = (relative["high"] - relative["low"]) / (2 * norm.ppf(0.975))
    return float(norm.cdf(slower / error - norm.ppf(0.975)))


def across_starts(reports: Sequence[Report]) -> Table:
    """Every start for the new version beside all others, at the first load."""
    made = Table("one start beside the others", "called different")
    for metric in ("throughput_tokens_per_second", "tokens_per_second", ACCEPTANCE):
        verdicts = []
        for place, new in enumerate(reports):
            others = [*reports[:place], *reports[place + 1 :]]
            for name in (FIRST, SECOND):
                repeats = repeats_of(others, name, metric)
                found = compare_arm(others[0], new, name, metric, repeats) if repeats else None
                if found is not None:
                    verdicts.append(found[0].verdict != NO_DIFFERENCE)
        if verdicts:
            made.add_row(metric, f"{sum(verdicts)} of {len(verdicts)}")
    return made


if __name__ == "__main__":
    typer.run(main)
