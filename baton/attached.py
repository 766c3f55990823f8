"""Processes that end with the one that starts them, however that ends."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

# Runs between fork and program, in a process of its own. A preexec_fn would run Python in the child of a parent that
# may have threads, and with it the fork handlers of gRPC's C core, in which the child crashes at times (gRPC 1.85).
# 1 is PR_SET_PDEATHSIG. A parent that died before that call is told by the changed parent id.
_LAUNCHER = """
import ctypes, os, sys
number, parent, *argv = sys.argv[1:]
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, int(number), 0, 0, 0)
if os.getppid() != int(parent):
    sys.exit(1)
os.execv(argv[0], argv)
"""


def attached(argv: Sequence[str], number: signal.Signals) -> list[str]:
    """The command that becomes `argv`, a program's path and its arguments. On Linux it is sent `number` when the thread
    that started it ends; elsewhere it only does not begin where its parent has ended already."""
    return [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(int(number)), str(os.getpid()), *argv]
