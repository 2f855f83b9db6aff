"""Prompts that the target writes itself: its chat template with the user's turn left open.

A chat model whose template stops where the user begins to speak goes on as the user (the idea is
Magpie's, arXiv 2406.08464). What it draws is kept in a journal, filtered, and written as a file of
prompts like any other.
"""

from __future__ import annotations

import json
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

from afaspec.capture.config import SELF_PROMPTS
from afaspec.capture.journal import AGAIN, Journal
from afaspec.capture.plan import Setup
from afaspec.capture.writers.protocol import Writer
from afaspec.store.manifest import NAME, read_manifest
from bench.prompts.near_copies import NearCopies
from bench.prompts.template import MARK
from drafts.errors import UserError
from drafts.files import atomic_file, write_json

JOURNAL, REPORT = "self_prompts.drawn.jsonl", "self_prompts.json"
FILES = {SELF_PROMPTS, JOURNAL, REPORT}
FILTER = 1  # raised when another filter would keep others
SHORTEST = 4  # tokens
NGRAM, VARIED = 4, 0.6  # at least this share of a prompt's n-grams of tokens must be different
SPARE = 1.25  # as many are drawn as are still wanted, where one block is enough
GIVE_UP_DRAWS, GIVE_UP_KEPT = 500, 10  # of the last so many drawn, fewer kept


@dataclass(frozen=True)
class OpenTurn:
    """A conversation up to the user's first word, as token `ids`.

    `ends` are the tokens that may end the turn, `closing` is the text that does where the template
    has no token for it, and `special` are tokens that no user writes. `room` is the most tokens
    that a whole prompt may have.
    """

    ids: list[int]
    ends: list[int]
    closing: str
    special: frozenset[int]
    room: int


def open_turn(setup: Setup) -> OpenTurn:
    """How the target is asked for a user's words. `UserError` for one without a chat template."""
    encoder = setup.encoder
    tokenizer, template = encoder.tokenizer, encoder.template
    if not template.source:
        raise UserError(
            "its tokenizer has no chat template, so that it cannot write a user's prompts",
            where=setup.target.folder,
            hint="give PROMPTS instead of --self-prompts, or a target that was trained to chat",
        )
    before, after = template.user_turn
    ids = encoder.ids(before.rstrip(" "), begin=False) or encoder.begin
    if not ids:
        raise UserError(
            "its chat template has nothing before a user's words, and its tokenizer no BOS: there "
            "is nothing to begin from",
            where=setup.target.folder,
            hint="give PROMPTS instead of --self-prompts",
        )
    closing = encoder.ids(after, begin=False)
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(i for i, token in added.items() if token.special)}
    marks = [token for token in closing if token in special or token in added]
    lines = [line.strip() for line in after.splitlines() if line.strip()]
    longest = len(ids) + setup.config.self_prompt_tokens + len(closing)
    return OpenTurn(
        ids=ids,
        ends=list(dict.fromkeys([*marks[:1], *setup.ends])),
        closing="" if marks or not lines else lines[0],
        special=frozenset({*special, *marks}),
        room=min(encoder.room, longest),
    )


def longest_sequence(setup: Setup) -> int:
    """The most tokens that a prompt of the target's own and its answer have."""
    return min(open_turn(setup).room + setup.config.max_new_tokens, setup.target.max_positions)


def write_self_prompts(
    setup: Setup,
    writer: Writer,
    note: Callable[[str], None],
    on_progress: Callable[[float, int], None],
) -> None:
    """Write `--self-prompts` prompts into the store's folder, with a report, and tell of them.

    What a run before has drawn is taken from its journal. `on_progress` is told how many are kept,
    and the tokens that this run has drawn. Raises `UserError` where too few can be used.
    """
    config, turn = setup.config, open_turn(setup)
    wanted = config.self_prompts
    assert wanted is not None
    _compare(setup)
    settings = {
        "target": setup.target.sha256,
        **setup.encoder.template.record(),
        "seed": config.seed,
        "temperature": config.self_prompt_temperature,
        "tokens": config.self_prompt_tokens,
        "opening": turn.ids,
        "ends": turn.ends,
        **writer.record(),
    }
    journal = Journal.open(config.out / JOURNAL, settings, overwrite=config.overwrite)
    sieve = Sieve(setup, turn, wanted)
    for block in journal.blocks:
        sieve.add(block)
    tokens, told = 0, 0.0
    while (left := wanted - len(sieve.kept)) > 0:
        number, size = len(journal.blocks), min(writer.block, ceil(SPARE * left))

        def step(fraction: float, new: int, left: int = left, size: int = size) -> None:
            nonlocal tokens, told
            tokens += new
            share = len(sieve.kept) / sieve.drawn if sieve.drawn else 1 / SPARE
            guess = len(sieve.kept) + fraction * min(share * size, left)
            told = max(told, guess)  # where a block gave fewer than others, it waits for the next
            on_progress(told, tokens)

        drawn = writer.write(
            [turn.ids] * size,
            new_tokens=min(config.self_prompt_tokens, setup.target.max_positions - len(turn.ids)),
            temperature=config.self_prompt_temperature,
            ends=turn.ends,
            seed=f"self-prompts:{config.seed}:{number}",
            longest=longest_sequence(setup),
            on_step=step,
        )
        journal.add(drawn)
        sieve.add(drawn)
        sieve.require_some()
    on_progress(wanted, tokens)
    _write(setup, sieve, settings)
    note(f"{config.out / SELF_PROMPTS}: {sieve.told()}")


class Sieve:
    """The first `wanted` usable prompts of all that is added, and why the others are left out."""

    def __init__(self, setup: Setup, turn: OpenTurn, wanted: int):
        self.setup, self.turn, self.wanted = setup, turn, wanted
        self.kept: list[str] = []
        self.dropped: Counter[str] = Counter()
        self._seen = NearCopies()
        self._last: deque[bool] = deque(maxlen=GIVE_UP_DRAWS)

    @property
    def drawn(self) -> int:
        return len(self.kept) + self.dropped.total()

    def add(self, block: list[list[int]]) -> None:
        """Judge the token ids of drawn prompts, in order, until there are enough."""
        for ids in block:
            if len(self.kept) == self.wanted:
                break
            text, fault = judge(ids, self.turn, self.setup.encoder.tokenizer)
            if fault is None and len(self._whole(text)) > self.turn.room:
                fault = "too long"
            if fault is None and not self._seen.add(text):
                fault = "near-copies"
            if fault:
                self.dropped[fault] += 1
            else:
                self.kept.append(text)
            self._last.append(fault is None)

    def require_some(self) -> None:
        """Raise `UserError` where next to nothing of the last draws could be used."""
        enough = len(self.kept) == self.wanted or len(self._last) < GIVE_UP_DRAWS
        if not enough and sum(self._last) < GIVE_UP_KEPT:
            raise UserError(
                f"writes hardly any usable prompt: {self.told()}",
                where=self.setup.target.folder,
                hint="ask for fewer, change --self-prompt-temperature or --self-prompt-tokens, or "
                "give PROMPTS",
            )

    def told(self) -> str:
        reasons = ", ".join(f"{count:,} {why}" for why, count in self.dropped.most_common())
        left = f"; left out: {reasons}" if reasons else ""
        return f"{len(self.kept):,} of {self.drawn:,} prompts kept that the target wrote{left}"

    def _whole(self, text: str) -> list[int]:
        """The prompt's token ids as it will be asked."""
        encoder = self.setup.encoder
        asked = encoder.template.text([{"role": "user", "content": text}], "", ask=True)
        return encoder.ids(asked, begin=False)


def judge(ids: list[int], turn: OpenTurn, tokenizer: Any) -> tuple[str, str | None]:
    """The text of a drawn prompt [n], and why it cannot be used (None: it can)."""
    ended = bool(ids) and ids[-1] in turn.ends
    words = ids[:-1] if ended else ids
    special = any(token in turn.special for token in words)
    text = tokenizer.decode(words, skip_special_tokens=False)
    if turn.closing:
        text, found, _ = text.partition(turn.closing)
        ended = ended or bool(found)
        words = tokenizer(text, add_special_tokens=False)["input_ids"]
    text = text.strip()
    ngrams = [tuple(words[i : i + NGRAM]) for i in range(len(words) - NGRAM + 1)]
    faults = {
        "unended": not ended,
        "empty": not text,
        "with special tokens": special or MARK in text,
        "with broken characters": "\ufffd" in text,
        "too short": len(words) < SHORTEST,
        "repetitive": bool(ngrams) and len(set(ngrams)) < VARIED * len(ngrams),
    }
    return text, next((why for why, found in faults.items() if found), None)


def _compare(setup: Setup) -> None:
    """Raise `UserError` for a store that was captured from other prompts, before any is drawn."""
    config = setup.config
    if config.overwrite or not (config.out / NAME).is_file():
        return
    found: dict[str, Any] | None = read_manifest(config.out).settings.get("self_prompts")
    wanted = config.self_prompt_settings()
    assert wanted is not None
    if found is not None and found["count"] < wanted["count"]:  # the store grows
        found = found | {"count": wanted["count"]}
    if found != wanted:
        raise UserError(
            f"this store was captured with other settings: self_prompts was {found}, now it is "
            f"{wanted}",
            where=config.out,
            hint=AGAIN,
        )


def _write(setup: Setup, sieve: Sieve, settings: dict[str, Any]) -> None:
    out = setup.config.out
    rows = ({"messages": [{"role": "user", "content": text}]} for text in sieve.kept)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    with atomic_file(out / SELF_PROMPTS) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")
    report = {
        "drawn": sieve.drawn,
        "kept": len(sieve.kept),
        "dropped": dict(sieve.dropped.most_common()),
        "filter": FILTER,
        "settings": settings,
    }
    write_json(out / REPORT, report)
