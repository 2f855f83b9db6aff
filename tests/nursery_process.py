"""Imports everything once, then forks a real `afaspec` process for each line it reads.

Not a test: `tests.nursery` starts it, so that 20 kills do not cost 20 imports of torch. It never
runs a tensor operation itself, so its children start without threads.
"""

from __future__ import annotations

import json
import os
import sys


def main() -> None:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401

    import afaspec.capture.run
    import afaspec.train.run  # noqa: F401
    from afaspec.cli import main as command

    torch.set_num_threads(1)
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            sys.argv = ["afaspec", *json.loads(line)]
            sys.stdin.close()
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # our own standard output has a reader
            try:
                command()
            except SystemExit as stop:
                os._exit(int(stop.code or 0))
            os._exit(0)
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


main()
