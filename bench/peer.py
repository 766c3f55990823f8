"""A peer as a subprocess that speaks bench/peers/protocol.py: starts it, gives it jobs, weighs it, ends it."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import bench
from baton.errors import ConfigError, Unavailable
from bench.memory import Resident, resident
from bench.peers.protocol import PREFIX, Settings
from bench.settings import PeerSpec
from bench.workloads import Job

_PACKAGE = Path(bench.__file__).resolve().parent
_STOP_SECONDS = 60.0
_LIMIT = "limit"
"""Option of every peer: only the first so many jobs, for one that would take minutes; figures are rates."""


class Peer:
    def __init__(self, spec: PeerSpec, settings: Settings) -> None:
        """Returns once it is ready. Raises Unavailable where it ends before that."""
        options = dict(spec.options)
        limit = options.pop(_LIMIT, None)
        if limit is not None and not limit.isdecimal():
            raise ConfigError(f"--peer {spec.name}: limit is {limit!r}; it must be a number of requests")
        self.name = spec.name
        self.limit = int(limit) if limit else None
        self._place = tempfile.TemporaryDirectory(prefix="baton-peer-")
        # A foreign Python must see this package and nothing else that is installed beside it.
        place = Path(self._place.name)
        (place / _PACKAGE.name).symlink_to(_PACKAGE)
        started = time.perf_counter()
        self._process = subprocess.Popen(
            [*_command(spec), json.dumps(asdict(replace(settings, options=options)))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=None if spec.kind in ("baton", "command") else place,
        )
        try:
            self.engine = str(self._reply()["name"])
        except BaseException:
            self.stop()
            raise
        self.start_seconds = time.perf_counter() - started

    def run(self, jobs: Sequence[Job]) -> float:
        """Seconds that the jobs took. Raises Unavailable where the peer ends, or generated anything else."""
        stdin = _pipe(self._process.stdin)
        wanted = [job.max_tokens for job in jobs]
        try:
            stdin.write(json.dumps({"prompts": [job.prompt for job in jobs], "max_tokens": wanted}) + "\n")
            stdin.flush()
        except BrokenPipeError:
            raise self._gone() from None
        reply = self._reply()
        if reply["generated"] != wanted:
            raise Unavailable(f"peer {self.name} generated {reply['generated']} tokens; {wanted} were asked for")
        return float(reply["seconds"])

    def resident(self) -> Resident:
        return resident(self._process.pid)

    def stop(self) -> None:
        with suppress(BrokenPipeError):
            _pipe(self._process.stdin).close()
        try:
            self._process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _pipe(self._process.stdout).close()
        self._place.cleanup()

    def _reply(self) -> dict[str, Any]:
        for line in _pipe(self._process.stdout):
            if line.startswith(PREFIX):
                reply: dict[str, Any] = json.loads(line.removeprefix(PREFIX))
                return reply
            print(f"{self.name}: {line}", end="", file=sys.stderr)
        raise self._gone()

    def _gone(self) -> Unavailable:
        status = self._process.wait()
        return Unavailable(f"peer {self.name} ended with status {status}; what it said is above")


def _command(spec: PeerSpec) -> list[str]:
    if spec.kind == "command":
        return [*spec.command]
    module = f"bench.peers.{spec.kind.replace('.', '_')}"
    # -E: what this process's PYTHONPATH names is not the peer's.
    return [spec.command[0], *(["-E"] if spec.kind != "baton" else []), "-m", module]


def _pipe(pipe: IO[str] | None) -> IO[str]:
    assert pipe is not None, "the process was started with pipes"
    return pipe
