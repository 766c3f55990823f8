"""Counts who touches a block set's bytes, so that its blocks are reused only when nobody does.

Owns the one answer to "is I/O of ours in flight?". Threads pass through a gate around every read, send or write of
a set's bytes; the event loop closes it once and learns when the last one is out. It never frees anything itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock

from baton.ids import TransferId


class Gate:
    """One set's. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._inside = 0
        self._closed = False
        self._drained: Callable[[], None] | None = None

    @property
    def in_flight(self) -> int:
        return self._inside

    @property
    def closed(self) -> bool:
        return self._closed

    def enter(self) -> bool:
        """False once closed: then the bytes must not be touched. True is to be followed by one `leave`."""
        with self._lock:
            if self._closed:
                return False
            self._inside += 1
            return True

    def stay(self) -> None:
        """One who is inside counts once more, closed or not: for a write that outlives the one who began it."""
        with self._lock:
            assert self._inside > 0, "stayed in a gate that was not entered"
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            assert self._inside > 0, "left a gate that was not entered"
            self._inside -= 1
            drained = self._drained if self._inside == 0 else None
            if drained is not None:
                self._drained = None
        if drained is not None:
            drained()

    @contextmanager
    def passing(self) -> Iterator[bool]:
        """`with gate.passing() as admitted:`, where False says that the gate is closed."""
        if not self.enter():
            yield False
            return
        try:
            yield True
        finally:
            self.leave()

    def close(self, drained: Callable[[], None]) -> bool:
        """Lets nobody in any more. True: nobody is inside. False: the last one out calls `drained`, on its thread."""
        with self._lock:
            assert not self._closed, "closed a gate twice"
            self._closed = True
            if self._inside == 0:
                return True
            self._drained = drained
            return False


class ReadPermit:
    """What may be read of one claimed set: the sealed blocks, each in one generation."""

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self._generations: dict[int, int] = {}

    def allow(self, index: int, generation: int) -> None:
        self._generations[index] = generation

    def covers(self, index: int, generation: int) -> bool:
        return self._generations.get(index) == generation


class ReadPermits:
    """The claimed sets of one source by transfer id. Written by the ledger on the event loop, read by the threads
    that serve bytes; a dict's get, set and pop are atomic."""

    def __init__(self) -> None:
        self._permits: dict[TransferId, ReadPermit] = {}

    def grant(self, transfer_id: TransferId, permit: ReadPermit) -> None:
        self._permits[transfer_id] = permit

    def withdraw(self, transfer_id: TransferId) -> None:
        self._permits.pop(transfer_id, None)

    def get(self, transfer_id: TransferId) -> ReadPermit | None:
        return self._permits.get(transfer_id)

    def snapshot(self) -> Mapping[TransferId, ReadPermit]:
        return dict(self._permits)
