"""What flags for vLLM's server say, by vLLM's own parser: a child, because importing it takes long.

Run as `python vllm_parser.py FLAGS...`. The last line of stdout is a JSON object: `given` names the
settings that the flags give, by the parser's own names; those of VALUES have their values with
them. Where the parser refuses, there is only `error`. vLLM takes prefixes of flags, dotted keys of
settings and files of flags: no reading of our own would see all of that.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
from typing import Any

TARGET = "(TARGET)"  # in the place of the model that our own command names
VALUES = ("trust_remote_code", "shutdown_timeout")


def main() -> None:
    """Print what the flags in `sys.argv` give."""
    gc.disable()  # a fifth of the time that vLLM takes to import goes into collections
    print(json.dumps(parse(make_parser(), sys.argv[1:])), flush=True)


def make_parser() -> Any:
    """vLLM's parser of the server's flags, whose defaults cannot be mistaken for given values."""
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before 0.32
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    parser = make_arg_parser(FlexibleArgumentParser())
    parser.set_defaults(**dict.fromkeys((action.dest for action in parser._actions), parser))
    return parser


def parse(parser: Any, flags: list[str]) -> dict[str, Any]:
    """`given` and its values, or an `error`."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            # after a flag, as in the server's own command: there is no subcommand
            found = vars(parser.parse_args(["--model", TARGET, *flags]))
    except SystemExit as stop:
        if not stop.code:  # --help
            return {"error": "these are no flags to serve with"}
        return {"error": said.getvalue().strip().rpartition("error: ")[2]}
    except Exception as error:  # a file of flags that is missing or no YAML
        return {"error": f"{type(error).__name__}: {error}"}
    given = [name for name, value in found.items() if value is not parser]
    if found["model"] == TARGET:
        given.remove("model")
    return {"given": given, **{name: found[name] for name in VALUES if name in given}}


if __name__ == "__main__":
    main()
