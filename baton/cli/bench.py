"""`baton bench engine|serve|transfer|handoff`: hands over to `bench`, which needs what workers and routers do."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from baton.errors import ConfigError

COMMANDS = {
    "engine": "the engine alone, offline: throughput, steps, prefill, beside the machine's limits and peers",
    "serve": "servers that speak OpenAI's completions, online: latencies and goodput by rate",
    "transfer": "blocks between two processes, by shm and tcp, beside memcpy and a bare socket",
    "handoff": "prefill and decode on two workers beside a unified one: first token, handoff gap",
}


def usage() -> str:
    lines = [f"  baton bench {name:<8}  {what}" for name, what in COMMANDS.items()]
    return "\n".join(
        ["usage: baton bench COMMAND [FLAGS]", "", *lines, "", "`baton bench COMMAND --help` lists a command's flags."]
    )


def main(argv: Sequence[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(usage())
        return 0
    if argv[0] not in COMMANDS:
        raise ConfigError(f"there is nothing called {argv[0]!r} to measure; it must be {' or '.join(COMMANDS)}")
    return os.execv(sys.executable, [sys.executable, "-m", "bench", *argv])
