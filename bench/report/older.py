"""Reports of older schemas, read as reports of today that measured less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.records.speeds import DECODE, FIGURES, REQUEST, THROUGHPUT, Speed
from bench.report.schema import load_words

NEW_IN_2 = ("categories", "accepted_lengths", "latency", "distribution")  # of every arm

Json = dict[str, Any]


def as_today(content: Mapping[str, Any]) -> Json:
    """The content of a report.json of `afaspec-report/1` or `/2` with the keys of today.

    Before `/3` one key stood for three speeds: the decode phase's in process, that of all requests
    together at a server, and in verdicts that of one request where a rate paced the server.
    """
    provenance = content["provenance"]
    speed = _speed(provenance, (provenance.get("loads") or [])[:1])
    found = {**content, "arms": [arm_as_today(arm, speed) for arm in content["arms"]]}
    found["comparisons"] = _comparisons(content.get("comparisons") or [], speed)
    if content.get("load"):
        found["load"] = [
            {
                **step,
                "arms": [arm_as_today(arm, at) for arm in step["arms"]],
                "comparisons": _comparisons(step.get("comparisons") or [], at),
            }
            for step in content["load"]
            for at in [_speed(provenance, [load_words(step)])]
        ]
    return found


def measurements_as_today(content: Mapping[str, Any]) -> Json:
    """The content of a measurements.json, whose times had the names of one speed alone."""
    arms = {
        name: {key.removeprefix("decode_"): value for key, value in arm.items()}
        for name, arm in content.get("arms", {}).items()
    }
    return {**content, "arms": arms} if "arms" in content else dict(content)


def _speed(provenance: Mapping[str, Any], loads: Sequence[str]) -> Speed:
    """What verdicts at these loads were about."""
    if provenance.get("mode") != "server":
        return DECODE
    return REQUEST if any("requests/s" in load for load in loads) else THROUGHPUT


def arm_as_today(arm: Mapping[str, Any], speed: Speed = DECODE) -> Json:
    """One arm's part of such a report; one of today stays as it is."""
    if "speed" in arm:
        return dict(arm)
    found = {**dict.fromkeys(NEW_IN_2), **arm}
    rate, of_request = (
        found.pop(key, None) for key in ("tokens_per_second", "tokens_per_second_per_request")
    )
    together = DECODE if speed is DECODE else THROUGHPUT
    found |= {"speed": speed.name, **dict.fromkeys(FIGURES), together.rate: rate}
    found |= {} if speed is DECODE else {REQUEST.rate: of_request}
    found[speed.speedup] = found.pop("speedup", None)
    if found["categories"]:
        found["categories"] = {
            name: _category(part, speed) for name, part in found["categories"].items()
        }
    return found


def _category(part: Mapping[str, Any], speed: Speed) -> Json:
    found = {**dict.fromkeys(FIGURES), **part}
    found[speed.rate] = found.pop("tokens_per_second", None)
    found[speed.speedup] = found.pop("speedup", None)
    return found


def _comparisons(found: Sequence[Mapping[str, Any]], speed: Speed) -> list[Json]:
    names = {"tokens_per_second": speed.rate, "speedup": speed.speedup}
    return [{**one, "metric": names.get(one["metric"], one["metric"])} for one in found]
