"""A server's traffic turns, and its draft follows: the whole loop once, with real clients.

    python docs/examples/loop_story.py --out runs/story               # SmolLM2: chat, then code
    python docs/examples/loop_story.py --target embedded --draft embedded-draft --out runs/small

`afaspec serve` and `afaspec loop run` run as they would anywhere; without a GPU each on its half of
the cores: beside a busy vLLM that has them all, nothing else gets on. Clients ask one kind of
prompt until the loop has learned what is usual, then another; some time after a new draft was kept
all ends. story.json has every answer's time, story.png the picture; the table is what clients saw.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import sysconfig
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from afaspec.demo.run import cpp_headers
from afaspec.demo.tasks import python_tasks
from afaspec.loop.history import History
from afaspec.loop.spans import read_spans
from afaspec.loop.watch import BASELINE
from afaspec.pairs.known import EMBEDDED, SMOLLM2
from bench.report.plots.style import COLOURS, INK, styled
from drafts.files import write_json
from serving.runtime import has_gpu

USUAL_DRAFTS = 3000  # that the loop's baseline is of, at least
LOOKED = 40.0  # seconds that a point of the picture is of
MARGIN = 10  # looks more before the traffic turns


@dataclass
class Clients:
    """So many clients that ask one thing after another. `answers` are those so far."""

    url: str
    prompts: dict[str, list[Any]]
    count: int
    max_tokens: int
    pause: float
    kind: str
    answers: list[dict[str, Any]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __enter__(self) -> Clients:
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(i,)) for i in range(self.count)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        draw = random.Random(number)
        while not self._over.wait(draw.expovariate(1 / self.pause) if self.pause else 0):
            kind = self.kind
            try:
                self.answers.append({"kind": kind, **self._ask(draw.choice(self.prompts[kind]))})
            except OSError as error:
                self.failures.append(str(error))

    def _ask(self, prompt: Any) -> dict[str, Any]:
        chat = isinstance(prompt, list)
        body = {"max_tokens": self.max_tokens, "temperature": 0, "messages": prompt}
        if not chat:
            body["prompt"] = body.pop("messages")
        request = urllib.request.Request(
            f"{self.url}/v1/{'chat/' if chat else ''}completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        began = time.time()
        with urllib.request.urlopen(request, timeout=600) as answer:
            tokens = json.load(answer)["usage"]["completion_tokens"]
            version = answer.headers["x-draft-version"]
        ended = time.time()
        return {"at": ended, "seconds": ended - began, "tokens": tokens, "version": version}


def main(
    target: Annotated[str, typer.Option(help="smollm2 or embedded.")] = "smollm2",
    draft: Annotated[str, typer.Option(help="Its draft.")] = "smollm2-draft",
    out: Annotated[Path, typer.Option(help="Folder, new.")] = Path("runs/story"),
    clients: Annotated[int, typer.Option(help="That ask at once.")] = 8,
    pause: Annotated[float, typer.Option(help="Seconds between a client's requests.")] = 1.0,
    max_tokens: Annotated[int, typer.Option()] = 64,
    steps: Annotated[int, typer.Option(help="Training steps.")] = 100,
    rows: Annotated[int, typer.Option(help="To learn from, at least.")] = 90,
    every: Annotated[float, typer.Option(help="Seconds between looks.")] = 3.0,
    probation: Annotated[int, typer.Option(help="Looks.")] = 30,
    after: Annotated[float, typer.Option(help="Seconds after a draft was kept.")] = 120.0,
    minutes: Annotated[float, typer.Option(help="All ends after so many.")] = 60.0,
) -> None:
    """Run the story and print what clients saw."""
    out.mkdir(parents=True)
    pair = {"smollm2": SMOLLM2, "embedded": EMBEDDED}[target]
    prompts = chats(pair.general) if target == "smollm2" else texts()
    with ExitStack() as stack:
        arguments = [target, "--draft", draft, "--swappable", "--port", "0"]
        arguments += ["--log", str(out / "vllm.log")]
        arguments += ["--collect", str(out / "traffic"), "--sample-rate", "1"]
        served, adapted = halves()
        stack.enter_context(running(out / "serve.log", served, "serve", *arguments))
        url = wait_for(out / "serve.log", r"Ready after .* at (http://\S+)", 1200)
        config = {
            "url": url, "target": target, "draft": draft, "traffic": str(out / "traffic"),
            "general": str(pair.general), "out": str(out / "loop"), "every": every,
            "rows": 2 * rows, "least_rows": rows,
            "steps": steps, "trial_steps": max(10, steps // 4), "least_gain": 0.01,
            "gate_prompts": 14, "general_prompts": 16, "new_tokens": min(64, max_tokens),
            "probation": probation, "retry_seconds": 5.0, "mix": 0.15, "eval_fraction": 0.2,
        }  # fmt: skip
        (out / "loop.yaml").write_text(yaml.safe_dump(config))
        stack.enter_context(
            running(out / "loop.log", adapted, "loop", "run", str(out / "loop.yaml"))
        )
        asking = Clients(url, prompts, clients, max_tokens, pause, "before")
        stack.enter_context(asking)
        turned = follow(asking, out / "loop", minutes, after)
    history = History(out / "loop", read_only=True)
    subprocess.run(
        [sys.executable, "-m", "afaspec", "loop", "report", str(out / "loop")], check=True
    )
    write_json(out / "story.json", {
        "config": config, "clients": clients, "pause": pause, "turned": turned,
        "answers": asking.answers, "failures": asking.failures,
        "journal": [asdict(entry) for entry in history.entries],
    })  # fmt: skip
    picture(out, asking.answers, history, turned)
    Console(width=100).print(table(asking.answers, history, turned))
    print(f"{len(asking.answers)} answers, {len(asking.failures)} failed")
    sys.exit(0 if any(entry.outcome == "kept" for entry in history.entries) else 1)


def follow(asking: Clients, loop: Path, minutes: float, after: float) -> float | None:
    """Let the traffic turn once the loop knows what is usual; wait until it has followed. Returns
    when it turned."""
    end, turned, kept = time.time() + 60 * minutes, None, None
    while time.time() < end and (kept is None or time.time() < kept + after):
        time.sleep(1)
        if turned is None:
            spans = [span for span in read_spans(loop) if span.drafts]
            if (
                len(spans) >= BASELINE + MARGIN
                and sum(s.drafts for s in spans) >= 1.2 * USUAL_DRAFTS
            ):
                asking.kind, turned = "after", time.time()
                print(f"{len(spans)} looks: the traffic turns", flush=True)
        elif kept is None:
            ended = [e for e in History(loop, read_only=True).entries if e.outcome == "kept"]
            kept = ended[0].at if ended else None
    return turned


def chats(general: Path) -> dict[str, list[Any]]:
    """Questions of all kinds, then functions to write."""
    before = [json.loads(line)["messages"] for line in general.read_text().splitlines()]
    tasks = [[{"role": "user", "content": text}] for text in python_tasks()]
    return {"before": before, "after": random.Random(0).sample(tasks, min(len(tasks), 600))}


def texts() -> dict[str, list[Any]]:
    """Beginnings of Python files' parts, then of C++ headers' parts."""

    def parts(folder: Path, suffix: str) -> list[Any]:
        files = sorted(folder.rglob(f"*{suffix}"))
        found = []
        for file in random.Random(0).sample(files, min(len(files), 300)):
            text = file.read_text(encoding="utf-8", errors="ignore")
            found += [text[at : at + 300] for at in range(0, len(text) - 300, 4000)][:4]
        return found

    return {
        "before": parts(Path(sysconfig.get_path("stdlib")), ".py"),
        "after": parts(cpp_headers(), ".h"),
    }


def halves() -> tuple[list[int], list[int]]:
    """Cores for the server and for the loop; all for both where the server has a GPU."""
    cores = sorted(os.sched_getaffinity(0))
    if has_gpu() or len(cores) < 2:
        return cores, cores
    return cores[: len(cores) // 2], cores[len(cores) // 2 :]


@contextmanager
def running(log: Path, cores: list[int], *arguments: str) -> Iterator[None]:
    """A command of ours on some cores, ended as a user would end it."""
    bound = (
        {"VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores))} if arguments[0] == "serve" else {}
    )
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "afaspec", *arguments],
            stdout=file,
            stderr=file,
            env={**os.environ, **bound},
        )
    os.sched_setaffinity(process.pid, cores)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=120)


def wait_for(log: Path, pattern: str, seconds: float) -> str:
    """What a log says, once it does."""
    end = time.time() + seconds
    while time.time() < end:
        if found := re.search(pattern, log.read_text(errors="ignore").replace("\n", " ")):
            return found[1]
        time.sleep(0.5)
    raise SystemExit(f"{log}: no {pattern!r} after {seconds:.0f} s")


def phases(history: History, turned: float | None) -> list[tuple[str, float, float]]:
    """What happened when: name, begin and end."""
    first = next((e.at for e in history.entries if e.state == "probation"), None)
    marks = [0.0, turned or float("inf"), first or float("inf"), float("inf")]
    names = ("usual traffic", "turned, old draft", "turned, new draft")
    return [(name, *between) for name, between in zip(names, pairwise(marks), strict=True)]


def table(answers: list[dict[str, Any]], history: History, turned: float | None) -> Table:
    """Tokens per second that a request saw, by phase."""
    shown = Table("phase", "answers", "tokens/s of a request: median", "25% to 75%")
    for name, begin, end in phases(history, turned):
        speeds = sorted(
            one["tokens"] / one["seconds"] for one in answers if begin <= one["at"] < end
        )
        if speeds:
            low, middle, high = (speeds[int(q * (len(speeds) - 1))] for q in (0.25, 0.5, 0.75))
            shown.add_row(name, f"{len(speeds)}", f"{middle:.1f}", f"{low:.1f} to {high:.1f}")
    return shown


def picture(
    out: Path, answers: list[dict[str, Any]], history: History, turned: float | None
) -> None:
    """Acceptance and the clients' tokens per second over time, with what the loop did."""
    with styled():
        from matplotlib import pyplot

        figure, (above, below) = pyplot.subplots(2, 1, figsize=(8.0, 5.4), sharex=True)
        spans = list(read_spans(out / "loop"))
        began = spans[0].at
        for version, colour in enumerate((COLOURS["base"], COLOURS["lora"], COLOURS["none"]), 1):
            own = [span for span in spans if span.version == version and span.drafts]
            groups = [list(one) for _, one in groupby(own, lambda span: span.at // LOOKED)]
            points = [
                (
                    (group[len(group) // 2].at - began) / 60,
                    1 + sum(s.accepted for s in group) / sum(s.drafts for s in group),
                )
                for group in groups
            ]
            if points:
                above.plot(
                    *zip(*points, strict=True),
                    "o-",
                    color=colour,
                    label=f"draft {version}",
                    markersize=3,
                )
            seen = [one for one in answers if one["version"] == str(version)]
            below.plot(
                [(one["at"] - began) / 60 for one in seen],
                [one["tokens"] / one["seconds"] for one in seen],
                "o", color=colour, markersize=2.5, alpha=0.6,
            )  # fmt: skip
        marks = [(turned, "traffic turns")] if turned else []
        words = {"collect": "drop noticed", "adapt": "trial says yes", "gate": "trained",
                 "probation": "swapped in"}  # fmt: skip
        marks += [(e.at, words[e.state]) for e in history.entries if e.state in words]
        for at, what in marks:
            for axes in (above, below):
                axes.axvline((at - began) / 60, color=INK, linewidth=0.8, linestyle="--")
            above.annotate(what, ((at - began) / 60, 1.0), xycoords=("data", "axes fraction"),
                           rotation=90, va="top", ha="right", fontsize=8)  # fmt: skip
        above.set_title("Acceptance length")
        above.set_ylim(bottom=1.0)
        below.set_title("Tokens per second of each answer, as its client saw it")
        below.set_xlabel("minutes")
        below.set_ylim(bottom=0)
        above.legend(loc="lower left")
        figure.savefig(out / "story.png", dpi=100, facecolor="white")


if __name__ == "__main__":
    typer.run(main)
