"""What to measure against servers, and how: the settings of such a run."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from pydantic import InstanceOf, model_validator

from bench.records.arms import Arm, require_distinct
from bench.records.config import BenchConfig
from bench.records.settings import ClientSettings, MeasureSettings
from bench.server.arrivals import Load
from bench.server.options import (
    read_headers,
    read_keys,
    read_pages,
    read_slo,
    require_free_fields,
)
from drafts.errors import UserError
from drafts.target.info import TargetInfo
from serving.remote import api_headers
from serving.sampling import NEUTRAL

SETTINGS = (
    "max_tokens", "rounds", "temperature", "seed", "ignore_eos", "warmup", "reuse_prefixes",
    "request_body", "request_seeds", "timeout", "retries", "ramp_up",
)  # fmt: skip

# What a request can do without. In place of max_completion_tokens it then has max_tokens.
OMITTABLE = (
    "temperature", *NEUTRAL, "stream_options", "ignore_eos", "return_token_ids", "cache_salt",
    "max_completion_tokens",
)  # fmt: skip


class ServerConfig(ClientSettings):
    """A run against servers. Every load is put on every server, `rounds` times, in turns.

    `target` tokenises the prompts as for an engine in process; None sends texts and conversations
    as they are. `requests` make a round (None: one per prompt; more go through the prompts again).
    `reuse_prefixes` lets prompts that come again hit the server's prefix cache. `token_ids` asks
    for the ids of the output, which the check for equal output needs.
    """

    prompts: str
    target: InstanceOf[TargetInfo] | None = None
    loads: tuple[InstanceOf[Load], ...] = (Load(concurrency=1),)
    token_ids: bool = True

    @property
    def omitted(self) -> tuple[str, ...]:
        """Fields that requests do without. Raises `UserError` for those they cannot."""
        names = tuple(name.strip() for name in (self.omit_fields or "").split(",") if name.strip())
        if wrong := [name for name in names if name not in OMITTABLE]:
            raise UserError(
                f"--omit-fields names {', '.join(wrong)}, which no request can do without or has",
                hint=f"choose of {', '.join(OMITTABLE)}",
            )
        if "ignore_eos" in names and self.ignore_eos:
            raise UserError(
                "--ignore-eos is a field of the request, which --omit-fields leaves out",
                hint="give one of the two",
            )
        return names

    @property
    def pages(self) -> dict[str, tuple[str, ...]]:
        """The addresses of the pages with counters, by arm, where they are not a server's own."""
        return read_pages(self.metrics_url)

    @property
    def limits(self) -> dict[str, float]:
        """What goodput asks of a request: milliseconds by latency."""
        return read_slo(self.slo)

    def headers_of(self, name: str) -> dict[str, str]:
        """What goes with every request to an arm's server: its key, and headers for all."""
        key = read_keys(self.key).get(name)
        own = {"Authorization": f"Bearer {key}"} if key else api_headers()
        return {**own, **read_headers(self.header)}

    @model_validator(mode="after")
    def _can_be_read(self) -> ServerConfig:
        assert self.omitted is not None
        assert self.pages is not None
        assert self.limits is not None
        assert self.headers_of("") is not None
        require_free_fields(self.request_body)
        return self

    @model_validator(mode="after")
    def _cut_by_a_tokenizer(self) -> ServerConfig:
        if self.target is None and (self.max_prompt_tokens is not None or self.truncate_prompts):
            raise UserError(
                "prompts are cut to a number of tokens by the target's tokenizer only",
                hint="give TARGET, the folder of the model that the servers serve",
            )
        if self.target is None and self.chat_date is not None:
            raise UserError(
                "the servers' own clocks tell their chat templates the date, not --chat-date",
                hint="give TARGET, the folder of the model that the servers serve, or no date",
            )
        return self

    def in_process(self, target: TargetInfo, k: int) -> BenchConfig:
        """The same settings for reading the prompts as for an engine in process."""
        return BenchConfig(
            **self.shared_with(MeasureSettings),
            target=target,
            prompts=self.prompts,
            arms=(),
            k=max(1, k),
        )

    def settings(self) -> dict[str, Any]:
        """The settings that a result must carry, beside those of prompts and servers."""
        return {
            "mode": "server",
            **{name: getattr(self, name) for name in SETTINGS},
            "prompt_source": self.prompts,
            "loads": [load.words for load in self.loads],
            "concurrency": ", ".join(
                str(load.concurrency) for load in self.loads if load.concurrency
            ),
            "dtype": "the servers' own type",
            "sampling": {
                name: "the server's own" if name in self.omitted else value
                for name, value in {"temperature": self.temperature, **NEUTRAL}.items()
            }
            | {name: value for name, value in self.request_body.items() if name in NEUTRAL},
            "omitted_fields": list(self.omitted),
            "headers": list(read_headers(self.header)),  # their values may be secrets
            "slo_ms": self.limits,
        }


def parse_url(text: str) -> tuple[str, str]:
    """Name and address from `NAME=URL`; an address alone is named `server`."""
    name, found, url = text.partition("=")
    if not found or "://" in name:  # an address may hold a = of its own
        name, url = "server", text
    if not name or not urlsplit(url).scheme.startswith("http"):
        raise UserError(
            f"cannot read the server {text!r}",
            hint="write --url NAME=URL, for example --url base=http://127.0.0.1:8001",
        )
    return name, url


def served_arms(
    urls: list[str], drafts: tuple[Arm, ...] = ()
) -> tuple[dict[str, str], dict[str, Arm]]:
    """Addresses by arm name, and the arms among `drafts` that say what a server drafts with.

    Raises `UserError` for a name that two servers have, and for a draft of no server.
    """
    pairs = [parse_url(text) for text in urls]
    names = [name for name, _ in pairs]
    require_distinct(names, "servers", "--url first=http://... --url second=http://...")
    known = {arm.name: arm for arm in drafts}
    for name in known:
        if name not in names:
            raise UserError(
                f"the draft {name!r} belongs to no server: they are {', '.join(names)}",
                hint="name it as its server, or --serve it",
            )
    return dict(pairs), known
