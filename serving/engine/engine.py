"""One vLLM engine in a child process: several can live at once, and none outlives its parent.

The child runs `serving.engine.worker`. Requests and replies are JSON lines over two pipes; all
that vLLM prints goes to a log file. An idle engine waits in a blocking read and burns no CPU,
because its engine core and model run in the child's one process (vLLM's multi-process executor
would keep spinning on shared memory for a second after each request, in its neighbour's way).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from drafts.checkpoint.info import DraftInfo
from drafts.errors import UserError
from drafts.target.info import TargetInfo
from serving.metrics import SpecCounters, counters_from_histogram, sum_counters
from serving.runtime import (
    divided_cores,
    has_gpu,
    require_vllm,
    runtime_environment,
    usable_cores,
)
from serving.speculation import Drafter, engine_options, speculative_config

if TYPE_CHECKING:
    from torch import Tensor

LOG_TAIL_LINES = 15


@dataclass(frozen=True)
class EngineSettings:
    """What one vLLM engine serves. `batch` is the number of requests that may run at once.

    `sampling_logprobs`: log-probabilities are those by which tokens are drawn, temperature and all,
    instead of the model's own; at temperature > 0 this costs a softmax per step.
    `speculation`: further fields of vLLM's `speculative_config`, which count more than ours.
    `states_of`: the layers whose states `hidden_states` is to give; such an engine drafts nothing.
    `tensor_parallel`: the devices over which the target is spread.
    """

    target: TargetInfo
    draft: Drafter = None
    k: int = 3
    temperature: float = 0.0
    seed: int = 0
    dtype: str = "bfloat16"
    max_model_len: int | None = None
    enforce_eager: bool = False
    batch: int = 1
    cache_gib: float = 1.0
    draft_sample_method: str | None = None
    speculation: Mapping[str, Any] = field(default_factory=dict, hash=False)
    sampling_logprobs: bool = False
    states_of: tuple[int, ...] | None = None
    tensor_parallel: int = 1


@dataclass(frozen=True)
class Request:
    """One finished request. Times are in seconds; the decode phase starts at the first token.

    `counters` is None without speculation. `logprobs` (when asked for) holds, per output
    position, the most probable tokens and their log-probabilities, best first.
    """

    output_ids: list[int]
    prefill_seconds: float
    decode_seconds: float
    counters: SpecCounters | None
    logprobs: list[list[tuple[int, float]]] | None = None


@dataclass(frozen=True)
class Generation:
    """The requests of one call, in order. `wall_seconds` covers the whole call.

    `decode_seconds` is the time from the first request's first token to the last token of all;
    `counters` is the sum over requests.
    """

    requests: list[Request]
    wall_seconds: float
    decode_seconds: float
    counters: SpecCounters | None


class EngineProcess:
    """A running engine. Use it as a context manager, or call `close`.

    Start it from the main thread: Linux ends the child with the *thread* that made it.
    """

    def __init__(self, settings: EngineSettings, log: Path | None = None, *, wait: bool = True):
        """Start the child; with `wait=False` return at once and let `wait_ready` wait for it."""
        require_vllm()
        self.settings = settings
        self.temperature = settings.temperature  # of the next calls of `generate`; may be changed
        self.log = log or Path(tempfile.mkdtemp(prefix="afaspec-engine-")) / "engine.log"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._states = self.log.parent / f"{self.log.stem}-states"  # of prompts not yet taken
        self.description: dict[str, Any] = {}
        with self.log.open("wb") as log_file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "serving.engine.worker", str(os.getpid())],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log_file,
                env=_child_environment(settings),
                start_new_session=True,  # its own process group, so that `close` ends it whole
                text=True,
            )
        try:
            self._send(_as_json(settings) | {"states_folder": str(self._prepared_states())})
            if wait:
                self.wait_ready()
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the child, which is also its process group."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until the models are loaded. Raises `UserError` with the log's end on failure."""
        if not self.description:
            try:
                self.description = self._receive()
            except BaseException:
                self.close()
                raise

    def generate(
        self,
        prompt_token_ids: list[list[int]],
        max_tokens: int,
        *,
        ignore_eos: bool = False,
        logprobs: int | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Generation:
        """Run all prompts, `settings.batch` of them at a time, and return them in order.

        At temperature > 0 each prompt draws by a seed of its own: that of `seeds`, else one made
        from `settings.seed` and its tokens, so that no two prompts share their luck and a
        repetition gives the same again.
        """
        reply = self._ask(
            op="generate",
            prompts=prompt_token_ids,
            max_tokens=max_tokens,
            temperature=self.temperature,
            ignore_eos=ignore_eos,
            logprobs=logprobs,
            seeds=None if seeds is None else list(seeds),
        )
        counters = [  # entry j of a histogram counts the steps that accepted exactly j tokens
            counters_from_histogram(row["histogram"], row["draft_tokens"])
            if row["histogram"] is not None
            else None
            for row in reply["requests"]
        ]
        requests = [
            Request(
                output_ids=row["output_ids"],
                prefill_seconds=row["first"] - row["scheduled"],
                decode_seconds=row["last"] - row["first"],
                counters=spec,
                logprobs=row["logprobs"],
            )
            for row, spec in zip(reply["requests"], counters, strict=True)
        ]
        return Generation(
            requests=requests,
            wall_seconds=reply["wall_seconds"],
            decode_seconds=max(row["last"] for row in reply["requests"])
            - min(row["first"] for row in reply["requests"]),
            counters=sum_counters([spec for spec in counters if spec is not None]),
        )

    def stream(
        self,
        prompt_token_ids: Sequence[Sequence[int]],
        max_tokens: int,
        *,
        seeds: Sequence[int],
        stop_token_ids: Sequence[int],
    ) -> Iterator[tuple[int, list[int]]]:
        """Yield (place in the prompts, token ids) of each prompt when it is finished.

        All are handed over at once, and `settings.batch` of them run together. A text ends at the
        first of `stop_token_ids`, which it keeps, or after `max_tokens`; the model's own end tokens
        do not count. Read it to the end before anything else is asked.
        """
        self.wait_ready()
        self._send(
            {
                "op": "stream",
                "prompts": [list(ids) for ids in prompt_token_ids],
                "max_tokens": max_tokens,
                "temperature": self.temperature,
                "seeds": list(seeds),
                "stop_token_ids": list(stop_token_ids),
            }
        )
        for _ in prompt_token_ids:
            reply = self._receive()
            yield reply["place"], reply["output_ids"]

    def hidden_states(
        self, prompt_token_ids: Sequence[Sequence[int]]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield (place in the prompts, states [n, layers, d]) of each prompt when it is read.

        Layers are those of `settings.states_of`, ascending; id i is the residual stream after i
        layers, never normed; the values are in the engine's dtype. All prompts are handed over at
        once. Read it to the end before anything else is asked. Raises `UserError` for a prompt that
        leaves no room for the token that vLLM wants to write behind it.
        """
        from safetensors.torch import load_file

        assert self.settings.states_of is not None
        self.wait_ready()
        longest, room = max(map(len, prompt_token_ids)), self.description["max_model_len"] - 1
        if longest > room:
            raise UserError(
                f"vLLM gives the hidden states of {room:,} tokens at most, {longest:,} are needed",
                where=self.settings.target.folder,
                hint="give --max-prompt-tokens or a lower --max-new-tokens, or let transformers "
                "give the states",
            )
        self._send({"op": "hidden_states", "prompts": [list(ids) for ids in prompt_token_ids]})
        for _ in prompt_token_ids:
            reply = self._receive()
            path = Path(reply["path"])
            states = load_file(path)["hidden_states"]
            path.unlink()
            if len(states) != len(prompt_token_ids[reply["place"]]) or not states.any(-1).all():
                raise self._failure("vLLM kept no hidden states of some tokens")
            yield reply["place"], states

    def score(
        self, prompt_token_ids: list[int], output_ids: list[int], top: int
    ) -> list[list[tuple[int, float]]]:
        """Log-probabilities at every output position from one prefill over the whole text.

        Per position the `top` most probable tokens and the given one, best first.
        """
        reply = self._ask(op="score", prompt=prompt_token_ids, output=output_ids, top=top)
        return [[(token, value) for token, value in row] for row in reply["logprobs"]]

    def replace_draft(self, draft: DraftInfo) -> float:
        """Put `draft`, of the running one's build, into its place; the seconds that it took.

        Raises `UserError` where it is of another build; the old one goes on then.
        """
        reply = self._ask(op="replace_draft", folder=str(draft.folder))
        if "refused" in reply:
            raise UserError(
                f"cannot take the running draft's place: {reply['refused']}",
                where=draft.folder,
                hint="start another engine with it",
            )
        self.settings = replace(self.settings, draft=draft)
        return float(reply["seconds"])

    def threads(self) -> int:
        """How many threads run the model on CPUs, as of now: what it has run may change that."""
        return int(self._ask(op="threads")["threads"])

    def engine_counters(self) -> SpecCounters:
        """vLLM's own counters since the start, as `/metrics` would report them."""
        reply = self._ask(op="counters")
        return SpecCounters(
            reply["drafts"],
            reply["draft_tokens"],
            reply["accepted_tokens"],
            tuple(reply["accepted_per_position"]),
        )

    def close(self) -> None:
        """End the child and everything it started. Safe to call twice."""
        with contextlib.suppress(OSError):
            if self._process.stdin:
                self._process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # it holds nothing that needs a goodbye
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()
        shutil.rmtree(self._states, ignore_errors=True)

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _prepared_states(self) -> Path:
        """The folder of states, empty; those of an engine that was killed are gone."""
        shutil.rmtree(self._states, ignore_errors=True)
        if self.settings.states_of is not None:
            self._states.mkdir()
        return self._states

    def _ask(self, **request: Any) -> dict[str, Any]:
        self.wait_ready()
        self._send(request)
        return self._receive()

    def _send(self, message: dict[str, Any]) -> None:
        pipe: IO[str] | None = self._process.stdin
        assert pipe is not None
        try:
            pipe.write(json.dumps(message) + "\n")
            pipe.flush()
        except (BrokenPipeError, ValueError):
            raise self._failure("the vLLM engine has ended") from None

    def _receive(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._failure("the vLLM engine ended unexpectedly")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise self._failure(f"the vLLM engine failed: {reply['error']}")
        return reply

    def _failure(self, problem: str) -> UserError:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=2)
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        tail = "\n".join(f"  {line}" for line in lines[-LOG_TAIL_LINES:])
        draft = self.settings.draft
        drafting = str(draft.folder) if isinstance(draft, DraftInfo) else draft or "no draft"
        return UserError(
            f"{problem} (target {self.settings.target.folder}, {drafting})\n"
            f"the end of its log:\n{tail}",
            where=self.log,
            hint="read the log, and run `afaspec doctor` to check the installation",
        )


def _child_environment(settings: EngineSettings) -> dict[str, str]:
    """The child's environment; what the user has set counts more than our defaults."""
    root = str(Path(__file__).resolve().parents[2])
    bound = {}
    if settings.tensor_parallel > 1 and not has_gpu():  # by itself vLLM divides sockets alone
        bound["VLLM_CPU_OMP_THREADS_BIND"] = divided_cores(settings.tensor_parallel)
    paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        "OMP_NUM_THREADS": str(usable_cores()),  # in one process vLLM neither binds nor reserves
        "KMP_BLOCKTIME": "5",  # ms that idle OpenMP threads may spin in another engine's way
        "NUMBA_NUM_THREADS": "1",  # what vLLM's n-gram drafter uses; more only wait for each other
        **bound,
        **os.environ,
        **runtime_environment(settings.cache_gib),
        "PYTHONPATH": os.pathsep.join(paths),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }


def _as_json(settings: EngineSettings) -> dict[str, Any]:
    """What the child is told: the settings, with vLLM's own words for target and draft."""
    own = {f.name: getattr(settings, f.name) for f in fields(settings)}
    del own["draft"], own["k"], own["draft_sample_method"], own["speculation"]
    return {
        **own,
        "target": str(settings.target.folder),
        "speculative_config": speculative_config(
            settings.draft,
            settings.k,
            draft_sample_method=settings.draft_sample_method,
            fields=settings.speculation,
        ),
        "options": engine_options(settings.target, settings.draft),
    }
