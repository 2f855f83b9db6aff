"""A report in words and in one table: what the page and the console both say first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.records.speeds import speed_of
from bench.report.schema import unexplained
from bench.stats.verdict import PHRASES
from drafts.files import shown_path

Json = Mapping[str, Any]

RATE, KEPT = "Acceptance rate", "General kept"
PER_STEP = "Tokens per step"
NOTHING = "–"
DISTRIBUTIONS = {True: "no bias", False: "biased", None: "not known"}  # of sampled output
MARKS = {"higher": "▲", "lower": "▼"}  # of verdicts; the others have "="


@dataclass(frozen=True)
class TableCell:
    """A table cell: the value, and what is said more quietly with it (an interval, a remark)."""

    text: str
    detail: str = ""
    best: bool = False


def table_columns(arms: Sequence[Json]) -> tuple[str, ...]:
    """The columns of `table_rows`; the speed is named for what was measured."""
    speed = speed_of(arms[0])
    columns = ("Arm", "Acceptance length", RATE, PER_STEP, speed.rate_label, speed.speedup_label)
    return (*columns, "Same output", *([KEPT] if any(_kept(arm) for arm in arms) else []))


def table_rows(arms: Sequence[Json]) -> list[list[TableCell]]:
    """A row per arm with the cells of `table_columns`; the best of each column is marked."""
    kept, speed = KEPT in table_columns(arms), speed_of(arms[0])
    best = {
        key: max((_value(arm[key]) for arm in arms), default=0.0)
        for key in ("acceptance_length", "acceptance_rate", speed.rate, speed.speedup)
    }

    def cell(arm: Json, key: str, form: str, scale: float = 1.0) -> TableCell:
        rivals = sum(_value(other[key]) > 0 for other in arms)
        is_best = rivals > 1 and _value(arm[key]) == best[key]
        return figure_cell(arm[key], form, scale, best=is_best)

    return [
        [
            TableCell(arm["label"]),
            cell(arm, "acceptance_length", "{:.2f}"),
            cell(arm, "acceptance_rate", "{:.1f}%", 100),
            figure_cell(arm.get("tokens_per_step"), "{:.2f}"),
            cell(arm, speed.rate, "{:,.1f}"),
            TableCell("1×") if is_plain(arm) else cell(arm, speed.speedup, "{:.2f}×"),
            _lossless_cell(arm),
            *([figure_cell(_kept(arm), "{:.1f}%", 100)] if kept else []),
        ]
        for arm in arms
    ]


def category_rows(
    arms: Sequence[Json], key: str, form: str
) -> tuple[list[str], list[list[TableCell]]]:
    """Columns and rows of a table of figure `key`: a row per category, a column per draft.

    The best draft of a row is marked. Drafts without that figure are left out.
    """
    shown = [
        arm
        for arm in arms
        if not is_plain(arm)
        and any(_value(found[key]) for found in (arm.get("categories") or {}).values())
    ]
    columns = ["Category", "Prompts", *(arm["label"] for arm in shown)]
    rows = []
    for name in shown[0]["categories"] if shown else ():
        found = [arm["categories"][name] for arm in shown]
        best = max(_value(entry[key]) for entry in found)
        cells = [
            figure_cell(entry[key], form, best=len(shown) > 1 and _value(entry[key]) == best)
            for entry in found
        ]
        rows.append([TableCell(name), TableCell(str(found[0]["prompts"])), *cells])
    return columns, rows


def figure_cell(
    figure: Json | None, form: str, scale: float = 1.0, *, best: bool = False
) -> TableCell:
    """A figure with its interval, written as `form`; a dash where it was not measured."""
    if not figure or figure["value"] is None:
        return TableCell(NOTHING)
    value = form.format(scale * figure["value"])
    if figure["low"] is None:
        return TableCell(value, "", best)
    low, high = (form.format(scale * figure[end]) for end in ("low", "high"))
    return TableCell(value, f"{low.rstrip('%×')}–{high}", best)


def headline(arms: Sequence[Json]) -> str:
    """What matters first: the fastest draft, what it gains, and with which interval."""
    drafted, speed = [arm for arm in arms if _value(arm["acceptance_length"])], speed_of(arms[0])
    if not drafted:
        rate = _value(arms[0][speed.rate])
        return f"{arms[0]['label']}: {rate:,.1f} tokens/s ({speed.noun})."
    top = max(
        drafted, key=lambda arm: _value(arm[speed.speedup]) or _value(arm["acceptance_length"])
    )
    base = next((arm for arm in drafted if arm["name"] == "base" and arm is not top), None)
    if not top[speed.speedup]:
        beside = f", the base draft {_length(base):.2f}" if base else ""
        return f"{top['label']} {_yields(top, interval=True)}{beside}."
    times = figure_cell(top[speed.speedup], "{:.2f}")
    phrase = PHRASES.get(top["name"], top["label"])
    gain = speed.times.format(arm=phrase, against=PHRASES["none"], times=times.text)
    if top["name"] in PHRASES:
        gain = gain[0].upper() + gain[1:]
    text = f"{gain}{_between(times)}; it {_yields(top)}."
    if base and base[speed.speedup]:
        its = _value(base[speed.speedup])
        text += f" The base draft: {its:.2f} times, {_length(base):.2f} tokens."
    return text


def also(arms: Sequence[Json]) -> str:
    """What else to know: whether the output is the target's, and what general prompts lost."""
    drafted = [arm for arm in arms if _value(arm["acceptance_length"])]
    said = (_lossless_sentence, _distribution_sentence, _general_sentence)
    return " ".join(sentence for words in said if drafted and (sentence := words(drafted)))


def sentences(arms: Sequence[Json]) -> str:
    """All of it, for a console."""
    return " ".join(part for part in (headline(arms), also(arms)) if part)


def _between(cell: TableCell) -> str:
    return f" ({cell.detail.replace('–', ' to ')})" if cell.detail else ""


def _length(arm: Json) -> float:
    """Tokens per step as delivered, or as accepted where nobody counted the steps."""
    return _value(arm.get("tokens_per_step")) or _value(arm["acceptance_length"])


def _yields(arm: Json, *, interval: bool = False) -> str:
    """Both figures where they are not the same to the eye."""
    length, accepted = (
        f"{value:.2f}" for value in (_length(arm), _value(arm["acceptance_length"]))
    )
    text = f"yields {length} tokens per target step"
    if interval:
        figure = arm.get("tokens_per_step") or arm["acceptance_length"]
        text += _between(figure_cell(figure, "{:.2f}"))
    return text if length == accepted else f"{text}, acceptance length {accepted}"


def settings_line(provenance: Json) -> str:
    """The run's main settings in one line."""
    temperature = provenance["temperature"]
    sampling = "greedy" if temperature == 0 else f"temperature {temperature}"
    parts = [
        _asked(provenance),
        f"up to {provenance['max_tokens']} tokens",
        sampling,
        f"k = {provenance['k']}",
        *(provenance.get("loads") or [f"concurrency {provenance['concurrency']}"]),
        f"{provenance['rounds']} round" + ("s" if provenance["rounds"] != 1 else ""),
        str(provenance["dtype"]),
    ]
    machine = provenance.get("machine") or {}
    if (threads := provenance.get("threads")) and not machine.get("gpus"):
        parts.append(f"{threads} of {machine['cores']} cores")
    return ", ".join(parts)


def _asked(provenance: Json) -> str:
    """How many prompts, of which suite, and how many turns if some have several."""
    prompts, turns = provenance["prompts"], provenance.get("turns")
    suite = provenance.get("suite")
    text = f"{prompts} prompts" + (f" of {suite['name']}" if suite else "")
    return text + (f" ({turns} turns)" if turns and turns != prompts else "")


def _lossless_cell(arm: Json) -> TableCell:
    lossless, sampled = arm["lossless"], arm.get("distribution")
    if sampled:
        detail = f"of {sampled['detects']:.2f} or more" if sampled["passed"] else ""
        return TableCell(DISTRIBUTIONS[sampled["passed"]], detail)
    if not lossless or is_plain(arm):
        return TableCell(NOTHING)
    matching, prompts = lossless["matching"], lossless["prompts"]
    return TableCell(f"{matching} of {prompts}", _difference_note(lossless))


def _difference_note(lossless: Json) -> str:
    differing = lossless["prompts"] - lossless["matching"]
    if not differing:
        return ""
    if wrong := unexplained(lossless):
        return f"{wrong} unexplained"
    ties = lossless["near_ties"]
    of = f"{ties} of {ties} examined: " if ties < differing else f"{ties} "
    return f"{of}near-tie" + ("s" if ties > 1 else "")


def _lossless_sentence(drafted: Sequence[Json]) -> str:
    records = [arm["lossless"] for arm in drafted if arm["lossless"]]
    if not records:
        return ""
    if all(record["matching"] == record["prompts"] for record in records):
        prompts = records[0]["prompts"]
        return f"Greedy output is the same, token for token, on all {prompts} prompts."
    differing = sum(record["prompts"] - record["matching"] for record in records)
    wrong = sum(map(unexplained, records))
    examined = wrong + sum(record["near_ties"] for record in records)
    outputs = sum(record["prompts"] for record in records)
    one = differing == 1
    found = f"Of {outputs} outputs {differing} differ{'s' if one else ''} from the one"
    found += " without speculation"
    if one:
        return f"{found}, {'not at a' if wrong else 'at a measured'} near-tie."
    if examined < differing:
        found += f"; {examined} were examined"
    if not wrong:
        return f"{found}, each at a measured near-tie."
    return f"{found}, {wrong} of them not at a near-tie."


def _distribution_sentence(drafted: Sequence[Json]) -> str:
    found = {
        arm["label"]: arm["distribution"]["passed"] for arm in drafted if arm.get("distribution")
    }
    failed = [label for label, passed in found.items() if passed is False]
    if failed:
        return f"The sampled output of {' and '.join(failed)} is not distributed as the target's."
    if None in found.values():
        return "Whether sampled output is distributed as the target's cannot be told."
    if found:
        seen = max(arm["distribution"]["detects"] for arm in drafted if arm.get("distribution"))
        return (
            f"No deviation of {seen:.2f} or more (total variation) from the target's distribution "
            "was found in sampled output."
        )
    return ""


def _general_sentence(drafted: Sequence[Json]) -> str:
    base = next((arm for arm in drafted if arm["name"] == "base" and arm.get("general")), None)
    kept = [(arm["label"], share) for arm in drafted if (share := _kept(arm))]
    if base is None or not kept:
        return ""
    found = base["general"]
    shares = " and ".join(f"{label} keeps {100 * _value(share):.1f}%" for label, share in kept)
    length = _value(found["acceptance_length"])
    return f"Of the base draft's {length:.2f} on {found['prompts']} general prompts {shares}."


def _kept(arm: Json) -> Json | None:
    """The share of the base draft's acceptance on general prompts, where it was measured."""
    share: Json | None = (arm.get("general") or {}).get("kept")
    return share


def token_shown(found: Json, of: str) -> str:
    """The token as text in quotes, or its id where the text is not known."""
    token, text = found[f"token_{of}"], found.get(f"text_{of}")
    if token is None:
        return "(the end)"
    return str(token) if text is None else json.dumps(text, ensure_ascii=False)


def setting_words(value: Any) -> str:
    """A setting's value as a reader writes it."""
    if value is None or value in ([], {}):
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        parts = value.items()
        return ", ".join(f"{key.replace('_', ' ')} {setting_words(part)}" for key, part in parts)
    if isinstance(value, list):
        return ", ".join(setting_words(part) for part in value)
    return shown_path(value) if isinstance(value, str) else json.dumps(value)


def is_plain(arm: Json) -> bool:
    """Whether the arm decodes without speculation."""
    return arm["provenance"]["method"] is None


def _value(figure: Json | None) -> float:
    """The value for comparing; 0 where there is none."""
    return float(figure["value"]) if figure and figure["value"] is not None else 0.0
