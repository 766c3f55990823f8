"""A whole Baton for as long as a program of this package needs one."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from baton.client import Client
from baton.errors import ConfigError


@asynccontextmanager
async def system(flags: Sequence[str]) -> AsyncIterator[Client]:
    """`baton up` with `flags`, on free ports, and a client of its router. Raises ConfigError if it does not start."""
    command = [sys.executable, "-m", "baton.cli.main", "up", "--grpc-port=0", "--http-port=0", *flags]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None, "stdout is a pipe"
        line = (await process.stdout.readline()).decode()
        if not line.startswith("baton ready "):
            raise ConfigError("the system did not start; what it said is above")
        doors = dict(pair.split("=", 1) for pair in line.split()[2:])
        async with Client(doors["grpc"]) as client:
            yield client
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()
