"""`baton COMMAND …`: finds the command and turns Baton's errors into one line and exit status 1."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence

from baton import __version__
from baton.errors import BatonError, ConfigError


def _up(argv: Sequence[str]) -> int:
    from baton.cli import up

    return up.main(argv)


def _generate(argv: Sequence[str]) -> int:
    from baton.cli import generate

    return generate.main(argv)


def _chat(argv: Sequence[str]) -> int:
    from baton.cli import chat

    return chat.main(argv)


def _status(argv: Sequence[str]) -> int:
    from baton.cli import status

    return status.main(argv)


def _bench(argv: Sequence[str]) -> int:
    from baton.cli import bench

    return bench.main(argv)


def _part(module: str) -> Callable[[Sequence[str]], int]:
    def run(argv: Sequence[str]) -> int:
        os.execv(sys.executable, [sys.executable, "-m", module, *argv])

    return run


COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "up": ("run a whole system on this machine", _up),
    "generate": ("stream one answer to the terminal", _generate),
    "chat": ("talk, turn by turn", _chat),
    "status": ("show the system as the router sees it", _status),
    "router": ("run the router", _part("router")),
    "prefill": ("run a prefill worker", _part("prefill_worker")),
    "decode": ("run a decode worker", _part("decode_worker")),
    "warmup": ("compile a model's GPU kernels ahead of time, as for an image", _part("worker.warmup")),
    "bench": ("measure the engine, or servers under load", _bench),
    "sim": ("drive the state machines through seeded faults, in virtual time", _part("sim")),
}

_ON_LINUX = {"up", "prefill", "decode"}
"""They start workers, whose pools are memory files that other processes open by /proc."""


def print_any_text() -> None:
    """What stdout's encoding has no way to write becomes `?`: an answer may be in any script."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # whoever calls us may have put something else there
        sys.stdout.reconfigure(errors="replace")


def usage() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  baton {name:<{width}}  {what}" for name, (what, _) in COMMANDS.items()]
    return "\n".join(
        ["usage: baton COMMAND [FLAGS]", "", *lines, "", "`baton COMMAND --help` lists a command's flags."]
    )


def main(argv: Sequence[str] | None = None) -> int:
    print_any_text()
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"baton {__version__}")
        return 0
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        print(f"baton: there is no command {command!r}\n\n{usage()}", file=sys.stderr)
        return 2
    try:
        if command in _ON_LINUX and sys.platform != "linux":
            raise ConfigError(
                f"this is {sys.platform}, and workers run on Linux: start them in a container made from Baton's "
                "Dockerfile; generate, chat and status work here"
            )
        return COMMANDS[command][1](rest)
    except BatonError as error:
        print(f"baton {command}: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `baton generate … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
