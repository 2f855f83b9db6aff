"""A server asked for log-probabilities, in the place of an engine in process."""

from __future__ import annotations

from typing import Any

from serving.engine.engine import Generation, Request
from serving.remote import RemoteServer
from serving.sampling import NEUTRAL

TOKEN = "token_id:"


class ServerEngine:
    """What `bench.lossless.greedy.explain` needs of an engine, over HTTP."""

    def __init__(self, server: RemoteServer):
        self.server = server

    def generate(
        self,
        prompt_token_ids: list[list[int]],
        max_tokens: int,
        *,
        ignore_eos: bool = False,
        logprobs: int | None = None,
    ) -> Generation:
        """Greedy outputs, one after another, with the `logprobs` most probable tokens of each."""
        requests = []
        for ids in prompt_token_ids:
            choice = self._complete(
                prompt=ids,
                max_tokens=max_tokens,
                ignore_eos=ignore_eos,
                logprobs=logprobs,
                return_tokens_as_token_ids=True,
            )
            found = choice["logprobs"]["top_logprobs"] if logprobs else None
            rows = None if found is None else [_row(row) for row in found]
            requests.append(Request(choice["token_ids"], 0.0, 0.0, None, rows))
        return Generation(requests, 0.0, 0.0, None)

    def score(
        self, prompt_token_ids: list[int], output_ids: list[int], top: int
    ) -> list[list[tuple[int, float]]]:
        """Log-probabilities at every output position from one prefill, best first."""
        choice = self._complete(
            prompt=prompt_token_ids + output_ids, max_tokens=1, prompt_logprobs=top
        )
        rows = choice["prompt_logprobs"][len(prompt_token_ids) :]
        return [
            sorted(
                ((int(token), float(entry["logprob"])) for token, entry in row.items()),
                key=lambda pair: -pair[1],
            )
            for row in rows
        ]

    def _complete(self, **body: Any) -> dict[str, Any]:
        answer = self.server.post(
            "/v1/completions", {"temperature": 0, **NEUTRAL, "return_token_ids": True, **body}
        )
        choice: dict[str, Any] = answer["choices"][0]
        return choice


def _row(values: dict[str, float]) -> list[tuple[int, float]]:
    pairs = [(int(token.removeprefix(TOKEN)), value) for token, value in values.items()]
    return sorted(pairs, key=lambda pair: -pair[1])
