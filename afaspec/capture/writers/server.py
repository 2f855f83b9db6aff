"""Writing on a vLLM server: many requests at once, each tried again where the server is overrun."""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from afaspec.capture.plan import Setup
from afaspec.capture.writers.protocol import OnStep, number_of
from drafts.errors import UserError
from serving.remote import RemoteServer, TransientError, connect
from serving.sampling import NEUTRAL

PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds before each further try of a request
# Words, code, numbers and signs: two models' tokens are seldom the same for all of it.
PROBE = """Whether two tokenizers agree shows in longer words, such as internationalization.

def parameters(self, *arguments: str, default: int = 1048576) -> list[dict[str, float]]:
    for number, argument in enumerate(arguments, start=1):
        raise NotImplementedError(f"{argument!r} is {number / 3.14159:,.2f}%")
        # caf\u00e9 na\u00efve \u4e16\u754c

    SELECT name, COUNT(*) FROM customers WHERE created >= '2026-11-27' GROUP BY name;
"""
ANSWER_SECONDS = 3600.0  # a loaded server may take its time for a long answer


class ServerWriter:
    """The server that `--generate-with` names; `--requests` of ours run there at once."""

    block = 512

    def __init__(self, setup: Setup):
        self.setup = setup
        self.server: RemoteServer = connect(
            setup.config.generate_with, setup.config.server_model, counted=False
        )
        self._require_same_tokens()

    def write(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        new_tokens: int,
        temperature: float,
        ends: Sequence[int],
        seed: str,
        longest: int,
        on_step: OnStep,
    ) -> list[list[int]]:
        self._require_room(longest)
        written: list[list[int]] = [[] for _ in prompts]
        asked: dict[str, Any] = {"max_tokens": new_tokens, "temperature": temperature, **NEUTRAL}
        asked |= {"stop_token_ids": list(ends), "return_token_ids": True}
        with ThreadPoolExecutor(self.setup.config.requests) as pool:
            waiting = {
                pool.submit(
                    self._answer, {"prompt": list(ids), "seed": number_of(f"{seed}:{row}"), **asked}
                ): row
                for row, ids in enumerate(prompts)
            }
            try:
                for done, future in enumerate(as_completed(waiting), start=1):
                    written[waiting[future]] = ids = future.result()
                    on_step(done / len(prompts), len(ids))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return written

    def record(self) -> dict[str, Any]:
        return {
            "with": f"vllm server {self.server.version or ''}".strip(),
            "model": self.server.model,
            "block": self.block,
        }

    def close(self) -> None:
        pass

    def _require_same_tokens(self) -> None:
        """Refuse a server of another model, as far as its tokens tell."""
        theirs = self.server.tokenize(prompt=PROBE, add_special_tokens=False)
        if theirs is not None and theirs != self.setup.encoder.ids(PROBE, begin=False):
            raise UserError(
                f"serves {self.server.root}, whose tokens are not those of "
                f"{self.setup.target.folder}",
                where=self.server.url,
                hint="serve the model that is captured",
            )

    def _require_room(self, longest: int) -> None:
        room = self.server.max_model_len
        if room is not None and room < longest:
            raise UserError(
                f"takes {room:,} tokens (--max-model-len), {longest:,} are needed",
                where=self.server.url,
                hint="give --max-prompt-tokens or a lower --max-new-tokens, or start it with more",
            )

    def _answer(self, body: dict[str, Any]) -> list[int]:
        """The token ids of an answer; a server that is gone or overrun is asked again."""
        for pause in (*PAUSES, None):
            try:
                found = self.server.post("/v1/completions", body, seconds=ANSWER_SECONDS)
                break
            except TransientError:
                if pause is None:
                    raise
                time.sleep(pause)
        return self._ids(found)

    def _ids(self, found: Any) -> list[int]:
        choices = found.get("choices") if isinstance(found, dict) else None
        ids = choices[0].get("token_ids") if choices and isinstance(choices[0], dict) else None
        if not isinstance(ids, list) or not all(isinstance(one, int) for one in ids):
            raise UserError(
                "answers without token ids, and its text does not say which they were",
                where=self.server.url,
                hint="let a vLLM server of version 0.11 or newer write, by its own address",
            )
        vocabulary = self.setup.target.vocab_size
        if strange := [one for one in ids if not 0 <= one < vocabulary]:
            raise UserError(
                f"answers with token {strange[0]}; the target has {vocabulary:,}",
                where=self.server.url,
                hint="serve the model that is captured",
            )
        return ids
