"""Does this draft fit this target? Answered from configs and tensor headers, before vLLM starts."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from drafts.checkpoint.info import DraftInfo
from drafts.checkpoint.source import open_source
from drafts.errors import UserError
from drafts.registry import module_names, wanted_layer_ids
from drafts.target.info import TargetInfo
from drafts.tensors import FLOATS
from drafts.tokenizer_files import vocabulary

OWN_TARGET = "use the draft with the target it was trained for"


@dataclass(frozen=True)
class Check:
    """One row: what the target has, what the draft has, and what to do when they do not fit.

    `note` says what follows from a difference that is allowed.
    """

    name: str
    target: str
    draft: str
    ok: bool
    hint: str = ""
    note: str = ""


def compare(t: TargetInfo, d: DraftInfo) -> list[Check]:
    """A row for each thing in which target `t` and draft `d` must agree, or may differ."""
    checks = [Check("method", t.model_type, d.method, True), _vocabulary(t, d)]
    if d.reads != "nothing":
        checks.append(_hidden_size(t, d))
    if d.reads == "layers":
        checks.append(_layer_ids(t, d))
    if d.max_positions is not None:
        checks.append(_positions(t, d))
    if d.rope is not None:
        checks.append(_rope(t, d))
    if d.method == "draft_model":
        checks += _tokenizer(t, d)
    if d.method == "mtp":
        checks.append(_own_kind(t, d))
    checks += [_to_store(name) for name in d.to_store]
    return [*checks, _dtype(t, d)]


def require_compatible(target: TargetInfo, draft: DraftInfo) -> list[Check]:
    """All rows, when each is ok. Raises `UserError` that lists the rows that are not."""
    checks = compare(target, draft)
    wrong = [check for check in checks if not check.ok]
    if wrong:
        rows = [f"  {c.name}: the target has {c.target}, the draft {c.draft}" for c in wrong]
        raise UserError(
            "\n".join([f"does not fit the target {target.folder}:", *rows]),
            where=draft.folder,
            hint="; ".join(dict.fromkeys(check.hint for check in wrong)),
        )
    return checks


def table(checks: list[Check]) -> Table:
    """The rows as a rich table."""
    result = Table(title="Target and draft", title_justify="left")
    for column in ("", "target", "draft", "fits", "note"):
        result.add_column(column)
    for check in checks:
        fits = "[green]yes[/]" if check.ok else "[bold red]no[/]"
        note = check.note if check.ok else check.hint
        result.add_row(check.name, check.target, check.draft, fits, note)
    return result


def _own_kind(t: TargetInfo, d: DraftInfo) -> Check:
    """An MTP layer is of its target's architecture."""
    own, found = t.config.get("model_type", t.model_type), d.config["model_type"]
    hint = "use the layer of this target: afaspec init mtp --target TARGET"
    return Check("layer", own, found, own == found, hint)


def _vocabulary(t: TargetInfo, d: DraftInfo) -> Check:
    reduced = d.draft_vocab_size != d.vocab_size
    found = f"{d.vocab_size:,}" + (f" (drafts {d.draft_vocab_size:,} of them)" if reduced else "")
    fits = t.vocab_size == d.vocab_size
    return Check("vocabulary", f"{t.vocab_size:,}", found, fits, OWN_TARGET)


def _hidden_size(t: TargetInfo, d: DraftInfo) -> Check:
    fits, note = d.target_hidden_size == t.hidden_size, ""
    if "embed_tokens.weight" in d.shared:
        fits = fits and d.hidden_size == t.hidden_size
        note = "the draft shares the target's embedding"
    found = f"{d.target_hidden_size}"
    if d.hidden_size != d.target_hidden_size:
        found += f" (its own {d.hidden_size})"
    return Check("hidden size", f"{t.hidden_size}", found, fits, OWN_TARGET, note)


def _layer_ids(t: TargetInfo, d: DraftInfo) -> Check:
    """The hidden states that the draft reads: id i is the state after i layers.

    vLLM hands them over in ascending order whatever the config says, and merges equal ones.
    """
    ids = wanted_layer_ids(d, t)
    inputs = _fused_inputs(d)
    fits = (
        list(ids) == sorted(set(ids))
        and ids[-1] <= t.num_layers
        and ids[0] >= 0
        and inputs == len(ids) * d.target_hidden_size
    )
    found = f"{list(ids)}" + ("" if inputs else " but no fc.weight")
    if inputs and inputs != len(ids) * d.target_hidden_size:
        found += f" but fc.weight takes {inputs} inputs"
    return Check(
        "layer ids",
        f"0 to {t.num_layers}",
        found,
        fits,
        "write eagle_aux_hidden_state_layer_ids into the draft's config.json: the distinct layers, "
        "in ascending order, that it was trained on",
        "" if d.layer_ids else "vLLM's default; the draft's config names none",
    )


def _fused_inputs(d: DraftInfo) -> int:
    stored = {own: name for name, own in module_names(d).items()}
    headers = open_source(d.folder).headers
    return headers[stored["fc.weight"]].shape[1] if "fc.weight" in stored else 0


def _positions(t: TargetInfo, d: DraftInfo) -> Check:
    assert d.max_positions is not None
    note = ""
    if d.max_positions < t.max_positions:
        note = f"no speculation past {d.max_positions:,} tokens"
    return Check("positions", f"{t.max_positions:,}", f"{d.max_positions:,}", True, note=note)


def _rope(t: TargetInfo, d: DraftInfo) -> Check:
    """For information: a draft may be trained with a rope of its own."""

    assert d.rope is not None

    def text(rope: dict[str, object]) -> str:
        return f"{rope['rope_type']}, theta {rope['rope_theta']:g}"

    same = text(t.rope) == text(d.rope)
    return Check("rope", text(t.rope), text(d.rope), True, note="" if same else "the draft's own")


def _tokenizer(t: TargetInfo, d: DraftInfo) -> list[Check]:
    """Do target and draft model mean the same by each token? No row where one does not say."""
    ours, theirs = vocabulary(t.folder), vocabulary(d.folder)
    if not ours or not theirs:
        return []
    counts = (f"{len(ours):,} tokens", f"{len(theirs):,} tokens")
    found = counts[1] + (", others" if ours != theirs and counts[0] == counts[1] else "")
    hint = "use a draft model with the target's own tokenizer"
    return [Check("tokenizer", counts[0], found, ours == theirs, hint)]


def _to_store(name: str) -> Check:
    hint = f"train it and serve what `afaspec merge` writes: vLLM wants {name} in the checkpoint"
    return Check(name.removesuffix(".weight"), "its own", "shares it", False, hint)


def _dtype(t: TargetInfo, d: DraftInfo) -> Check:
    fits = d.dtype in FLOATS
    note = f"vLLM runs the draft in {t.dtype}" if fits and d.dtype != t.dtype else ""
    hint = f"save the draft as one of {', '.join(FLOATS)}"
    return Check("dtype", t.dtype, d.dtype, fits, hint, note)
