"""`python -m bench COMMAND`: where `baton bench` ends up, which itself loads neither torch nor aiohttp."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from baton.errors import BatonError, ConfigError


def main(argv: Sequence[str]) -> int:
    command, rest = argv[0], argv[1:]
    try:
        return _run(command, rest)
    except BatonError as error:
        print(f"baton bench {command}: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def _run(command: str, argv: Sequence[str]) -> int:
    try:
        if command == "engine":
            from bench import offline

            return offline.main(argv)
        if command == "transfer":
            from bench import transfer

            return transfer.main(argv)
        if command == "handoff":
            from bench import handoff

            return handoff.main(argv)
        from bench import online

        return online.main(argv)
    except ModuleNotFoundError as error:
        extra = "router" if command == "serve" else "worker"
        raise ConfigError(f"{error.name} is not installed; it comes with `pip install 'baton[{extra}]'`") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
