"""Fetch Prometheus from Debian without installing it: `python tools/get_prometheus.py FOLDER`.

Prints the folder with `prometheus` and `promtool`; needs apt-get and dpkg, no rights. For the test
of docs/monitoring.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Fetch it, unless it is there; the exit status is 1 where that fails."""
    folder = Path(sys.argv[1]).absolute()
    programs = folder / "usr" / "bin"
    if not (programs / "prometheus").is_file():
        lists = folder / "lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        apt = ["apt-get", "-qq", f"-oDir::State::Lists={lists}", "-oAPT::Sandbox::User=root"]
        try:
            subprocess.run([*apt, "update"], check=True, cwd=folder)
            subprocess.run([*apt, "download", "prometheus"], check=True, cwd=folder)
            (package,) = folder.glob("prometheus_*.deb")
            subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            print(error, file=sys.stderr)
            return 1
    print(programs)
    return 0


if __name__ == "__main__":
    sys.exit(main())
