"""`make test`: tests that only compute have all cores, a worker each; those that start processes, wait, or look at time
run one by one behind them. Whoever names paths gets plain pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_COMPUTING = ("tests/engine", "tests/kernels", "tests/sim")
_MOST_WORKERS = 8
_NONE_COLLECTED = 5


def main() -> int:
    asked = sys.argv[1:]
    if any(Path(word.partition("::")[0]).exists() for word in asked):
        return _pytest(asked)
    workers = min(len(os.sched_getaffinity(0)), _MOST_WORKERS)
    codes = [
        _pytest([*_COMPUTING, f"--numprocesses={workers}", "--dist=loadfile", *asked]),
        _pytest([*(f"--ignore={path}" for path in _COMPUTING), *asked]),
    ]
    if set(codes) == {_NONE_COLLECTED}:
        return _NONE_COLLECTED
    return max(code for code in codes if code != _NONE_COLLECTED)


def _pytest(words: Sequence[str]) -> int:
    command = [sys.executable, "-m", "pytest", *words]
    print(f"test: {' '.join(command[1:])}", flush=True)
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
