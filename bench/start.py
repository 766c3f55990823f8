"""From nothing to ready, and the memory that it took: each side in a fresh process, ours as well."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from math import prod

from bench.figures import Figure
from bench.peer import Peer
from bench.peers.protocol import Settings
from bench.progress import Progress
from bench.roofline import Work
from bench.settings import PeerSpec
from bench.workloads import w1
from engine.models.tensors import expected_tensors

_MB = 1e6


def start_figures(
    settings: Settings, own: str, peers: Sequence[PeerSpec], work: Work, rounds: int, progress: Progress
) -> list[Figure]:
    """Seconds until the first answer can be asked for, and resident memory behind W1. Files are in the page cache from
    the first round on, for every side."""
    weights = sum(prod(shape) for shape in expected_tensors(work.spec).values()) * work.itemsize
    specs = [PeerSpec(own, "baton", (sys.executable,), {}), *peers]
    seconds: dict[str, list[float]] = {spec.name: [] for spec in specs}
    total: dict[str, list[float]] = {spec.name: [] for spec in specs}
    over: list[float] = []
    jobs = w1(work.spec.vocab_size)
    for _ in range(rounds):
        for spec in specs:
            peer = Peer(spec, settings)
            try:
                peer.run(jobs[: peer.limit])
                resident = peer.resident()
            finally:
                peer.stop()
            seconds[spec.name].append(peer.start_seconds)
            total[spec.name].append(resident.total / _MB)
            if spec.name == own:
                over.append((resident.total - resident.shared - weights) / _MB)
            progress.advance(f"{spec.name}: start")
    return [
        *(Figure("cold start to ready", "start", name, "s", tuple(runs)) for name, runs in seconds.items()),
        *(Figure("memory behind W1", "resident", name, "MB", tuple(runs)) for name, runs in total.items()),
        # On a CPU our pool is all that we have in shared memory; where a peer's lies is not known.
        Figure("memory behind W1", "over weights + KV pool", own, "MB", tuple(over)),
    ]
