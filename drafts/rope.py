"""The rotary embedding that a draft's config asks for, as transformers and vLLM read it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from drafts.errors import UserError

DEFAULT_THETA = 10_000.0
# What each kind must say beside its theta. What they may say: `OPTIONAL`.
KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "original_max_position_embeddings"),
}
OPTIONAL = {
    "yarn": (
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    )
}
ANY_KIND = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
NAMES = {
    "rope_type",
    "type",
    "rope_theta",
    *ANY_KIND,
    *sum((*KINDS.values(), *OPTIONAL.values()), ()),
}
LONG = "vLLM takes short or long factors by the length that its server is started with"
OTHER = "use a draft whose rope is one of " + ", ".join(KINDS)


def read_rope(
    config: dict[str, Any], path: Path, *, theta: float | None, later: bool = False
) -> dict[str, Any]:
    """The rope's `rope_type`, `rope_theta` and parameters, all named as in `rope_parameters`.

    `config` is on one level and has `max_position_embeddings`. `theta` is what counts where none is
    named (None: one must be). Where the config has both `rope_scaling` and `rope_parameters`, the
    first counts; with `later`, as in the speculators layout, the one that stands later.
    Raises `UserError` for what vLLM computes otherwise or not at all.
    """
    rope, field = _stated(config, later)
    if unknown := sorted(rope.keys() - NAMES):
        raise UserError(
            f"{field} has {', '.join(unknown)}, which afaspec does not know", where=path, hint=OTHER
        )
    rope["rope_type"] = kind = _kind(rope, field, path)
    rope.setdefault("rope_theta", config.get("rope_theta", theta))
    if config.get("partial_rotary_factor") is not None:
        rope.setdefault("partial_rotary_factor", config["partial_rotary_factor"])
    if "original_max_position_embeddings" in KINDS[kind]:
        trained = config.get("original_max_position_embeddings")
        rope.setdefault("original_max_position_embeddings", config["max_position_embeddings"])
        if trained is not None:
            rope["original_max_position_embeddings"] = trained
    numbers = ("rope_theta", *KINDS[kind])
    for name in (*numbers, "partial_rotary_factor"):
        value = rope.get(name, 1.0 if name not in numbers else None)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise UserError(
                f"{field} of the kind {kind} has {name} {value!r}, expected a number above 0",
                where=path,
                hint=f"write the {name} that the draft was trained with",
            )
    known = ("rope_type", *numbers, *OPTIONAL.get(kind, ()), *ANY_KIND)
    return {name: rope[name] for name in known if rope.get(name) is not None}


def _stated(config: dict[str, Any], later: bool) -> tuple[dict[str, Any], str]:
    """The rope that counts, and the name of its field."""
    named = [key for key in config if key in ("rope_scaling", "rope_parameters")]
    if later:
        named = named[-1:]
    named = [key for key in sorted(named, reverse=True) if config[key]]
    return (dict(config[named[0]]), named[0]) if named else ({}, "rope_parameters")


def _kind(rope: dict[str, Any], field: str, path: Path) -> str:
    """The rope's kind, its older names (`type`, `mrope`) made the newer ones."""
    kind, older = rope.get("rope_type"), rope.pop("type", None)
    alike = (None, kind, {"default": "mrope", "longrope": "su"}.get(str(kind)))
    if kind is not None and older not in alike:
        raise UserError(
            f"{field} has rope_type {kind} and type {older}",
            where=path,
            hint="remove the one that the draft was not trained with",
        )
    kind = kind or older or "default"
    if kind == "mrope" and "mrope_section" in rope:
        return "default"  # its sections have one position in text
    if kind not in KINDS:
        why = f": {LONG}" if kind in ("longrope", "su") else ""
        raise UserError(
            f"has a rope of the kind {kind!r} in {field}, which afaspec does not compute{why}",
            where=path,
            hint=OTHER,
        )
    return str(kind)
