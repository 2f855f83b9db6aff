"""Settings that several commands share. They hold what was given, paths and names unopened.

A class's GROUP is the panel of `--help` that its settings stand in.
"""

from __future__ import annotations

import json
from datetime import date, datetime
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from drafts.tensors import Float
from serving.runtime import compute_dtype

Split = Literal["train", "eval"]


def _joined(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return str(value) if isinstance(value, int | float) else value


Listed = Annotated[str, BeforeValidator(_joined)]  # `1,4,16`; YAML may have a list or a number
FIELDS = (
    "messages", "conversations", "conversation", "turns", "prompt", "question", "instruction",
    "text", "response", "answer", "tools", "system", "input", "category", "role", "content",
)  # fmt: skip


def _names_and_paths(fields: list[str] | None) -> list[str] | None:
    for text in fields or []:
        name, _, path = text.partition("=")
        if name not in FIELDS or not path:
            raise ValueError(f"expected NAME=PATH, with a NAME of {', '.join(FIELDS)}")
    return fields


RowFields = Annotated[
    list[str] | None,
    AfterValidator(_names_and_paths),
    Field(
        description="where rows of another shape have a field: NAME=PATH, such as "
        "messages=log.turns (repeat it); role and content are those of every message"
    ),
]
SkipBadRows = Annotated[bool, Field(description="drop and count rows that cannot be used")]
EvalFraction = Annotated[
    float,
    Field(
        gt=0, lt=1, description="share of the eval side: of all prompts, by where each one begins"
    ),
]
_TEXT = BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)
# A folder, a name of ours, or a hub id: no Path, which would make owner/name of ./owner/name.
ModelName = Annotated[str, _TEXT]
OptionalModelName = Annotated[str | None, _TEXT]
SuiteFolder = Annotated[
    Path | None,
    Field(description="folder with the files of suites (default: AFASPEC_DATA; else fetched)"),
]


def _json_object(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    if not isinstance(found, dict):
        raise ValueError("not a JSON object")
    return found


def _iso_date(value: str | None) -> str | None:
    if value is not None:
        datetime.fromisoformat(value)
    return value


JsonObject = Annotated[dict[str, Any], BeforeValidator(_json_object)]
TemplateKwargs = Annotated[
    dict[str, Any],
    BeforeValidator(_json_object),
    Field(
        description='variables of the chat template, as JSON: {"enable_thinking": false}',
    ),
]
ChatDate = Annotated[
    str | None,
    BeforeValidator(lambda value: value.isoformat() if isinstance(value, date) else value),
    AfterValidator(_iso_date),
    Field(
        description="what a chat template's clock says, such as 2026-01-31 (default: today; in a "
        "folder that is gone on with, as it was)",
    ),
]


class Settings(BaseModel):
    """Checked when made, fixed from then on. Unknown settings are refused."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
    )

    def shared_with(self, kind: type[Settings]) -> dict[str, Any]:
        """Those of the settings that `kind` has, by name."""
        return {name: getattr(self, name) for name in kind.model_fields}


class PromptSource(Settings):
    """Where prompts come from: see `bench.prompts.suites.prompt_source`."""

    GROUP: ClassVar[str] = "Prompts"

    prompts: str | None = Field(
        None, description="JSONL file, folder of source files, dataset id, or suite:NAME"
    )
    suite: str | None = Field(
        None, description="NAME or NAME/CATEGORY of a suite; see `afaspec suites`"
    )
    size: str | None = Field(None, description="of the suite: quick (default) or full")


class PromptSettings(Settings):
    """Which of the prompts are taken, and how long they are."""

    GROUP: ClassVar[str] = "Prompts"

    suite_folder: SuiteFolder = None
    limit: int | None = Field(None, ge=1, description="prompts at most, drawn by --seed")
    split: Split | None = Field(None, description="take one side of the prompts only")
    eval_fraction: EvalFraction = 0.1
    field: RowFields = None
    skip_bad_rows: SkipBadRows = False
    prompt_tokens: int = Field(128, ge=1, description="prompt length in plain texts and files")
    max_prompt_tokens: int | None = Field(
        None, ge=1, description="longest prompt allowed (default: what the target allows)"
    )
    truncate_prompts: bool = Field(
        False, description="cut longer prompts: the oldest turns go first, the system's text stays"
    )
    chat_template_kwargs: TemplateKwargs = {}
    chat_date: ChatDate = None

    @property
    def fields_by_name(self) -> dict[str, str]:
        """The paths of `field` by name."""
        return {name: path for name, _, path in (text.partition("=") for text in self.field or [])}


class RunSettings(Settings):
    """How a measurement is repeated."""

    GROUP: ClassVar[str] = "Measuring"

    rounds: int = Field(3, ge=1, description="how often every prompt is run")
    ignore_eos: bool = Field(False, description="always write all --max-tokens")
    seed: int = Field(0, description="of sampling, choice and intervals")


class MeasureSettings(RunSettings, PromptSettings):
    """What measuring in process and on servers have in common."""

    GROUP: ClassVar[str] = "Measuring"

    max_tokens: int = Field(
        128,
        ge=1,
        validation_alias=AliasChoices("max_tokens", "max_new_tokens"),
        description="tokens to write per prompt",
    )
    temperature: float = Field(0.0, ge=0, description="0 is greedy, and checks the output")
    warmup: int = Field(2, ge=0, description="prompts run before anything is measured")


class DraftSettings(Settings):
    """How drafts are run, and how their output is tested."""

    GROUP: ClassVar[str] = "Drafting"

    k: int = Field(
        3,
        ge=1,
        description="speculative tokens per step; without it DFlash and DSpark drafts fill their "
        "block",
    )
    draft_sample_method: str | None = Field(
        None, description="how drafts sample at temperature > 0, by vLLM's names"
    )
    samples: int = Field(
        1000,
        ge=0,
        description="requests per arm that test the distribution at temperature > 0; 0: none",
    )


class ClientSettings(MeasureSettings):
    """How running servers are asked."""

    GROUP: ClassVar[str] = "Servers"

    model: str | None = Field(None, description="the name that they serve the model by")
    requests: int | None = Field(
        None, ge=1, description="requests in a round (default: each prompt once)"
    )
    reuse_prefixes: bool = Field(False, description="let prompts hit the prefix cache")
    omit_fields: Listed | None = Field(
        None, description="fields to leave out of requests, for strict servers: top_k,min_p"
    )
    metrics_url: list[str] = Field(
        [],
        description="NAME=URL of a page with an arm's vLLM counters (repeat it for several "
        "engines), or NAME=none [default: the server's own /metrics, where it has them]",
    )
    key: list[str] = Field(
        [],
        description="NAME=VARIABLE: the environment variable with an arm's key [default: "
        "VLLM_API_KEY, else OPENAI_API_KEY]",
    )
    header: list[str] = Field([], description="NAME: VALUE, sent with every request; repeatable")
    request_body: JsonObject = Field(
        {},
        description="fields for every request beside or over ours, as JSON: "
        '{"top_p": 0.9, "stop": ["\\n"]}',
    )
    request_seeds: bool = Field(False, description="a seed of its own for every request")
    timeout: float = Field(3600.0, gt=0, description="seconds that a request may take")
    retries: int = Field(
        0, ge=0, description="times that a refused request is sent again (429, 5xx, no connection)"
    )
    ramp_up: float = Field(
        0.0, ge=0, description="seconds over which a closed loop's requests begin, one by one"
    )
    patience: float = Field(
        300.0, ge=0, description="seconds that a server which went away may take to come back"
    )
    slo: Listed | None = Field(
        None, description="limits in ms for goodput, as ttft:500,tpot:50,e2e:10000"
    )


class VllmSettings(Settings):
    """How vLLM's engines run."""

    GROUP: ClassVar[str] = "vLLM"

    dtype: Annotated[Literal["auto", Float], AfterValidator(compute_dtype)] = Field(
        "auto",
        validate_default=True,
        description="type that vLLM computes in: bf16, where the processor has it",
    )
    enforce_eager: bool = Field(False, description="do not compile: starts sooner, runs slower")
    cache_gib: float = Field(1.0, gt=0, description="KV cache per engine, in GiB")
    tensor_parallel: int = Field(1, ge=1, description="devices over which the target is spread")


class BenchSettings(VllmSettings, DraftSettings, MeasureSettings):
    """Measuring in process."""

    GROUP: ClassVar[str] = "Measuring"

    block: int = Field(4, ge=1, description="prompts that an arm runs at least before the next")
    engines: Literal["together", "in-turn"] = Field(
        "together",
        description="all loaded at once, so that they take turns, or one after another where "
        "memory holds no two",
    )
