"""Compiles the CPU kernels, and knows where the result is. Needs only the standard library and a C compiler.

    python -m engine.kernels.cpu.build      # puts it beside its source, as `make setup` and the image do

Where nothing was put there, as after a plain `pip install`, it is compiled on first use into the user's cache.
File names carry a hash of all that the code depends on, so that one from other sources is never loaded.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

HERE = Path(__file__).resolve().parent
CACHE = Path("~/.cache/baton/kernels")
COMPILERS = ("cc", "gcc", "clang")
# No -march: the instruction sets are chosen at run time. No -fopenmp: see common.h on threads.
FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-fno-strict-aliasing", "-fno-math-errno", "-Wno-psabi")
COMPILE_SECONDS = 300.0


class BuildError(Exception):
    """One line: what is missing or went wrong."""


def find_or_compile() -> Path:
    """The compiled kernels: from beside their sources, from the cache, or compiled into the cache now.

    Raises BuildError where none of these can be.
    """
    beside = HERE / _file_name()
    if beside.is_file():
        return beside
    compiler = _compiler()
    try:
        cached = CACHE.expanduser() / _file_name(_version(compiler))
        if not cached.is_file():
            log.info("compiling the CPU kernels with %s into %s, once", compiler, cached)
            compile_to(cached, compiler)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        raise BuildError(f"the CPU kernels can't be kept in {CACHE}: {error}") from error
    return cached


def compile_to(path: Path, compiler: str) -> None:
    """Whole or not at all, whoever else does the same at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".compiling-") as directory:
        made = Path(directory) / path.name
        command = [compiler, *FLAGS, *map(str, sources("*.c")), "-o", str(made), "-lm"]
        compiler_process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        try:
            _, said = compiler_process.communicate(timeout=COMPILE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(compiler_process.pid, signal.SIGKILL)  # the compiler proper is a child of what was started
            compiler_process.wait()
            raise BuildError(f"`{' '.join(command)}` took more than {COMPILE_SECONDS:.0f} s") from None
        if compiler_process.returncode != 0:
            said = next((line for line in said.splitlines() if "error" in line), said.strip()[-200:])
            raise BuildError(f"`{' '.join(command)}` failed: {said}")
        os.replace(made, path)


def sources(pattern: str = "*.[ch]") -> list[Path]:
    return sorted(HERE.glob(pattern))


def _file_name(compiler_version: str = "") -> str:
    digest = hashlib.sha256("\n".join((*FLAGS, sys.platform, platform.machine(), compiler_version)).encode())
    for source in sources():
        digest.update(source.name.encode() + source.read_bytes())
    return f"kernels-{digest.hexdigest()[:16]}.so"


def _compiler() -> str:
    for name in COMPILERS:
        path = shutil.which(name)
        if path is not None:
            return path
    raise BuildError(f"there is no C compiler ({', '.join(COMPILERS)}) to compile the CPU kernels with")


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=COMPILE_SECONDS).stdout


def main() -> int:
    beside = HERE / _file_name()
    try:
        if not beside.is_file():
            compile_to(beside, _compiler())
    except (BuildError, OSError) as error:
        print(f"{error}; torch's operations serve in their place, which are slower", file=sys.stderr)
        return 1
    for other in HERE.glob("kernels-*.so"):
        if other != beside:
            other.unlink()
    print(beside)
    return 0


if __name__ == "__main__":
    sys.exit(main())
