"""`baton router`."""

from __future__ import annotations

import sys

from baton import logs
from baton.config import RouterConfig, parse
from baton.errors import BatonError


def main() -> int:
    try:
        config = parse(RouterConfig, sys.argv[1:], prog="baton router")
        logs.configure(config.log.log_level, "router")
        import uvloop  # after the flags: a wrong one need not wait for the router's parts

        from router.server import serve

        uvloop.run(serve(config))
    except BatonError as error:
        print(f"baton router: {error.message}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
