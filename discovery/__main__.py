"""`python -m discovery --port 0`: the embedded Redis as a process, for `baton up`. Starts it again when it dies.

Prints `baton redis ready url=…` on stdout once it answers; ends on SIGTERM.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time

from baton.errors import BatonError
from discovery.embedded import EmbeddedRedis

_WATCH_SECONDS = 0.2


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m discovery", description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    asked_to_stop: list[int] = []  # no Event: to set one in a handler that came while it is waited for is a deadlock
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: asked_to_stop.append(number))
    redis = EmbeddedRedis(parser.parse_args().port)
    try:
        redis.start()
        print(f"baton redis ready url={redis.url} pid={redis.pid}", flush=True)
        while not asked_to_stop:
            time.sleep(_WATCH_SECONDS)
            if not asked_to_stop and not redis.running:
                print("redis died; starting it again", file=sys.stderr)
                redis.start()
    except BatonError as error:
        print(f"baton redis: {error.message}", file=sys.stderr)
        return 1
    finally:
        redis.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
