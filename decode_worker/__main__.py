"""`baton decode`."""

from __future__ import annotations

import sys

from baton.config import DecodeConfig, parse
from baton.errors import BatonError


def main() -> int:
    try:
        config = parse(DecodeConfig, sys.argv[1:], prog="baton decode")
    except BatonError as error:
        print(f"baton decode: {error.message}", file=sys.stderr)
        return 1
    from decode_worker.server import serve  # imports torch: seconds that a wrong flag need not cost

    return serve(config)


if __name__ == "__main__":
    sys.exit(main())
