"""Which of vLLM's flags a user may give beside ours."""

from __future__ import annotations

from drafts.errors import UserError

OURS = "afaspec sets it; give it before the `--`"
REFUSED = {
    "--host": OURS,
    "--port": OURS,
    "--speculative-config": OURS,
    "-sc": OURS,
    "--model": "afaspec sets it from TARGET",
    "--trust-remote-code": "afaspec runs no code from model folders",
    "--uds": "afaspec serves over TCP only",
    "--ssl-certfile": "afaspec serves plain HTTP; put a proxy that ends TLS in front",
}


def refuse_flags(extra_args: tuple[str, ...]) -> None:
    """Raise `UserError` for a vLLM flag that would undo what afaspec promises."""
    for argument in extra_args:
        flag = argument.partition("=")[0].replace("_", "-")
        if flag in REFUSED:
            raise UserError(f"{flag} cannot be passed through to vLLM", hint=REFUSED[flag])
