"""`make test`: tests that only compute have all cores, a worker each; those that start processes, wait, or look at time
run one by one behind them. Whoever names paths gets plain pytest."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_COMPUTING = ("tests/engine", "tests/kernels", "tests/sim")
_WORKERS = ("--numprocesses=logical", "--maxprocesses=8", "--dist=loadfile")
_NONE_COLLECTED = 5  # pytest's own


def main() -> int:
    asked = sys.argv[1:]
    if any(Path(word.partition("::")[0]).exists() for word in asked):
        return _pytest(asked)
    codes = [
        _pytest([*_COMPUTING, *_WORKERS, *asked]),
        _pytest([*(f"--ignore={path}" for path in _COMPUTING), *asked]),
    ]
    ran = [code for code in codes if code != _NONE_COLLECTED]
    return next((code for code in ran if code), 0) if ran else _NONE_COLLECTED


def _pytest(words: Sequence[str]) -> int:
    command = [sys.executable, "-m", "pytest", *words]
    print(f"test: {' '.join(command[1:])}", flush=True)
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
