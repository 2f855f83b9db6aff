"""Kill a server and its loop at random moments, again and again: is anything lost or wrong?

    python docs/examples/loop_kills.py --kills 30 --out runs/kills

Clients ask all the time, cycles begin all the time, and every so many seconds SIGKILL ends the loop
(with its training or its gate in it) or the server; what was killed is started again. Printed is
what is true at the end: answers that differ from the first ones to the same prompt, rows of the
traffic that cannot be read or are there twice, steps of the journal that cannot follow each other.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

from afaspec.loop.history import History
from drafts.errors import UserError
from drafts.files import write_json
from serving.server.ask import ask_for_versions
from serving.traffic.shards import Traffic

PROMPTS = ["import os\n\ndef ", "class Reader:\n    def __init__(", "for line in open(path):\n    "]
PROMPTS += [f"def f{i}(a, b):\n    return a" for i in range(20)]
FOLLOWS: dict[str, set[str]] = {
    "watch": {"collect"},
    "collect": {"trial"},
    "trial": {"adapt", "watch"},
    "adapt": {"gate", "watch"},
    "gate": {"swap", "watch"},
    "swap": {"probation", "watch"},
    "probation": {"restore", "watch", "swap"},
    "restore": {"watch"},
}


class Running:
    """A command that is started again after a kill."""

    def __init__(self, log: Path, cores: list[int], *arguments: str):
        self.log, self.cores, self.arguments = log, cores, arguments
        self.start()

    def start(self) -> None:
        with self.log.open("ab") as file:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "afaspec", *self.arguments],
                stdout=file,
                stderr=file,
                env={**os.environ, "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, self.cores))},
                start_new_session=True,
            )
        os.sched_setaffinity(self.process.pid, self.cores)

    def kill(self) -> None:
        """At once, and start again."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()
        self.start()


class Client(threading.Thread):
    """Asks for ever. `known` has the first answer to each prompt, `wrong` what differs from it."""

    def __init__(self, url: str):
        super().__init__(daemon=True)
        self.url = url
        self.known: dict[str, str] = {}
        self.wrong: list[str] = []
        self.answered = self.unanswered = 0
        self.over = False

    def run(self) -> None:
        draw = random.Random(0)
        while not self.over:
            prompt = draw.choice(PROMPTS)
            try:
                text = self.ask(prompt)
            except (OSError, HTTPException):  # the server is being killed, or is not yet back
                self.unanswered += 1
                time.sleep(0.3)
                continue
            self.answered += 1
            if self.known.setdefault(prompt, text) != text:
                self.wrong.append(prompt)

    def ask(self, prompt: str) -> str:
        body = {"prompt": prompt, "max_tokens": 32, "temperature": 0}
        request = urllib.request.Request(
            f"{self.url}/v1/completions",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=120) as answer:
            text: str = json.load(answer)["choices"][0]["text"]
            return text


def main(
    out: Annotated[Path, typer.Option(help="Folder, new.")] = Path("runs/kills"),
    kills: Annotated[int, typer.Option(help="Of server and loop together.")] = 30,
    servers: Annotated[int, typer.Option(help="Of these, of the server.")] = 6,
    longest: Annotated[float, typer.Option(help="Seconds from one kill to the next.")] = 60,
    port: Annotated[int, typer.Option(help="Of the server.")] = 8765,
    seed: Annotated[int, typer.Option()] = 0,
) -> None:
    """Kill, and say what is true at the end; the exit status is 1 where anything is wrong."""
    out.mkdir(parents=True)
    url, draw, traffic = f"http://127.0.0.1:{port}", random.Random(seed), str(out / "traffic")
    config = {
        "url": url, "target": "embedded", "draft": "embedded-draft", "general": "suite:builtin",
        "traffic": traffic, "out": str(out / "loop"), "every": 0.5, "rows": 40,
        "least_rows": 24, "after_rows": 24, "trial_steps": 3, "steps": 6, "least_gain": 0.0,
        "gate_prompts": 4, "general_prompts": 4, "new_tokens": 24, "probation": 10, "mix": 0.1,
        "eval_fraction": 0.3, "retry_seconds": 2.0,
    }  # fmt: skip
    (out / "loop.yaml").write_text(yaml.safe_dump(config))
    cores = sorted(os.sched_getaffinity(0))  # for each half of them, as in loop_story.py
    half = max(1, len(cores) // 2)
    server = Running(
        out / "serve.log", cores[:half], "serve", "embedded", "--draft", "embedded-draft",
        "--port", str(port),
        "--swappable", "--collect", traffic, "--sample-rate", "1", "--log",
        str(out / "vllm.log"), "--", "--enforce-eager", "--max-model-len", "512",
    )  # fmt: skip
    wait_until_up(url)
    client = Client(url)
    client.start()
    loop = Running(out / "loop.log", cores[half:] or cores, "loop", "run", str(out / "loop.yaml"))
    turns = ["server"] * servers + ["loop"] * (kills - servers)
    draw.shuffle(turns)
    killed: list[str] = []
    for number, turn in enumerate(turns, 1):
        time.sleep(draw.uniform(5, longest))
        state = History(out / "loop", read_only=True).last.state
        killed.append(f"{turn}, in {state}")
        print(f"{number}: the {turn}, while the loop is in {state}", flush=True)
        if turn == "server":
            server.kill()
            wait_until_up(url)
        else:
            loop.kill()
        if loop.process.poll() is not None:  # it had no server to begin with
            loop.start()
    time.sleep(20)
    client.over = True
    client.join(timeout=120)
    found = judged(out, client, url)
    for one in (loop, server):
        one.process.send_signal(signal.SIGTERM)
        one.process.wait(timeout=120)
    found["kills"] = {what: killed.count(what) for what in dict.fromkeys(killed)}
    write_json(out / "kills.json", found)
    print(json.dumps(found, indent=1))
    sys.exit(1 if found["faults"] else 0)


def wait_until_up(url: str) -> None:
    """Until the server answers."""
    end = time.time() + 600
    while time.time() < end:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5)
            return
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the server does not come back")


def judged(out: Path, client: Client, url: str) -> dict[str, Any]:
    """What is true at the end."""
    faults = [f"another answer to {prompt!r}" for prompt in client.wrong]
    rows = 0
    try:
        ids = [row["id"] for row in Traffic(out / "traffic").rows()]
        rows = len(ids)
        if len(set(ids)) < len(ids):
            faults.append(f"{len(ids) - len(set(ids))} rows of the traffic are there twice")
    except (UserError, ValueError) as error:
        faults.append(f"traffic: {error}")
    entries = History(out / "loop", read_only=True).entries
    before: str = "watch"
    for entry in entries:
        if entry.state != before and entry.state not in FOLLOWS[before]:
            faults.append(f"cycle {entry.cycle}: {entry.state} after {before}")
        before = entry.state
    outcomes = [entry.outcome for entry in entries if entry.outcome]
    return {
        "answered": client.answered, "unanswered": client.unanswered, "rows": rows,
        "cycles": max((entry.cycle for entry in entries), default=0),
        "outcomes": {name: outcomes.count(name) for name in dict.fromkeys(outcomes)},
        "serves": ask_for_versions(url)[-1]["folder"], "faults": faults,
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
