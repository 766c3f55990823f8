"""Makes .venv with everything that Baton's parts, tests and tools need, pinned by constraints.txt: `make setup`.

Does nothing where .venv is up to date: a stamp in it holds a hash of all that it was made from. Needs only the
standard library, and never touches anything outside .venv but pip's own cache.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "baton-setup.sha256"
LOG = VENV / "baton-setup.log"
KERNELS = ROOT / "engine" / "kernels" / "cpu"
EXTRAS = "router,worker,client,dev"
TICK_SECONDS = 2.0
PLAIN_TICK_SECONDS = 15.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch", default="torch", help="pip's words for torch, such as torch==2.13.0")
    torch = parser.parse_args().torch
    wanted = fingerprint(torch)
    if STAMP.is_file() and STAMP.read_text() == wanted and runs(VENV / "bin" / "python"):
        return 0
    started = time.monotonic()
    print("setup: making .venv (the first time takes some minutes, mostly for torch)", flush=True)
    if VENV.exists() and not is_ours():
        shutil.rmtree(VENV)
    if not VENV.exists():
        announce(f"virtual environment with Python {sys.version.split()[0]}")
        venv.EnvBuilder(with_pip=True, symlinks=True).create(VENV)
    constraints = ["--constraint", str(ROOT / "constraints.txt")]
    # torch alone and first: with anything else beside it, pip may settle for another build of it.
    pip("torch", *torch.split(), *constraints)
    # Build tools pinned like the rest; pip's isolated builds would fetch their own.
    pip("build tools", "setuptools", *constraints)
    pip("Baton and its dependencies", "--no-build-isolation", "--editable", f"{ROOT}[{EXTRAS}]", *constraints)
    announce("the CPU's kernels")
    # Where it can't be compiled, it says so, and Baton runs without.
    subprocess.run([VENV / "bin" / "python", "-m", "engine.kernels.cpu.build"], cwd=ROOT, stdout=subprocess.DEVNULL)
    STAMP.write_text(wanted)
    print(f"setup: done in {time.monotonic() - started:.0f} s; .venv/bin/baton is there", flush=True)
    return 0


def fingerprint(torch: str) -> str:
    """Of all that .venv is made from. The place counts: scripts and the editable install name it."""
    digest = hashlib.sha256(f"{ROOT}\n{torch}\n".encode())
    for name in ("pyproject.toml", "constraints.txt", ".ci/make_venv.py"):
        digest.update((ROOT / name).read_bytes())
    for source in sorted((*KERNELS.glob("*.[ch]"), KERNELS / "build.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()


def runs(python: Path) -> bool:
    try:
        return subprocess.run([python, "-c", ""], capture_output=True).returncode == 0
    except OSError:
        return False


def is_ours() -> bool:
    """Whether the .venv that stands there works and was made here: a copied or moved one does not."""
    ask = "import sys; print(sys.prefix, sys.version_info[0], sys.version_info[1])"
    try:
        answer = subprocess.run([VENV / "bin" / "python", "-c", ask], capture_output=True, text=True)
        pip_works = subprocess.run([VENV / "bin" / "pip", "--version"], capture_output=True).returncode == 0
    except OSError:
        return False
    return pip_works and answer.stdout.split() in ([str(VENV), "3", "11"], [str(VENV), "3", "12"])


def announce(step: str) -> None:
    print(f"setup: {step}", flush=True)


def pip(step: str, *arguments: str) -> None:
    """Runs `pip install`, shows how far it is, keeps what it says in LOG; exits with its last lines if it fails."""
    announce(step)
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--no-input", "--progress-bar", "off", *arguments]
    with LOG.open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        watch(process)
    except BaseException:
        process.terminate()
        raise
    if process.returncode != 0:
        tail = "\n".join(LOG.read_text(errors="replace").splitlines()[-25:])
        print(f"{tail}\nerror: `{' '.join(command)}` failed; all it said is in {LOG}", file=sys.stderr)
        sys.exit(1)


def watch(process: subprocess.Popen[bytes]) -> None:
    """Until it ends, one line that is rewritten on a terminal; now and then a new line where there is none."""
    terminal = sys.stdout.isatty()
    started = time.monotonic()
    while True:
        try:
            process.wait(TICK_SECONDS if terminal else PLAIN_TICK_SECONDS)
            break
        except subprocess.TimeoutExpired:
            text = f"  {time.monotonic() - started:4.0f} s  {last_line()}"[:78]
            print(f"\r{text:<78}" if terminal else text, end="" if terminal else "\n", flush=True)
    if terminal:
        print(f"\r{'':<78}\r", end="", flush=True)


def last_line() -> str:
    """What pip is at, in its own words; behind "Installing collected packages" it is silent for long."""
    words = ("Collecting", "Downloading", "Using cached", "Building", "Preparing", "Obtaining", "Installing")
    lines = [line.strip() for line in LOG.read_text(errors="replace").splitlines()]
    told = [line for line in lines if line.startswith(words)]
    if not told:
        return "starting pip"
    return "unpacking and installing" if told[-1].startswith("Installing collected") else told[-1]


if __name__ == "__main__":
    sys.exit(main())
