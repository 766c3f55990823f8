"""One agent of NIXL, the only place that imports it: memory that peers may read, reads of theirs, and its end.

Owns the order in which an agent is taken down. A read that was given up is not over: a peer that was stopped and goes
on may still answer it, into whatever the memory is by then. It is over when the agent is gone, and `destroy` says
whether it is.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import secrets
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from baton.errors import ConfigError

log = logging.getLogger(__name__)

NAME = "nixl"
_BACKEND, _KIND = "UCX", "DRAM"
_LEAST_PAUSE, _MOST_PAUSE = 20e-6, 1e-3  # seconds, between two looks at a read
_OWN_REFERENCES = 2  # its wrapper's, and that of the call that counts them


class NixlFailed(Exception):
    """A read failed or took too long: the agent is to be destroyed."""


class Piece(NamedTuple):
    """Of one read: addresses, and how many bytes."""

    local: int
    remote: int
    size: int


def check_installed() -> None:
    """Raises ConfigError where NIXL is not."""
    _module()


def _module() -> Any:
    try:
        from nixl import _api

        return _api
    except ImportError as error:
        raise ConfigError(
            f"--transport nixl needs NIXL, which can't be loaded ({error}); it comes with `pip install 'baton[nixl]'`"
        ) from None


class Scratch:
    """Memory that only its reader knows."""

    def __init__(self, size: int) -> None:
        self._mapping = mmap.mmap(-1, size)
        self.view = memoryview(self._mapping)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))


class NixlAgent:
    """Thread-safe, but for `destroy`, which must be the last call. Calls block, and a read may copy all of its bytes
    before it returns: for threads, never for an event loop."""

    def __init__(self, *, serves: bool) -> None:
        """`serves`: peers read from it, for which some networks need a thread here. Raises ConfigError where NIXL or
        its UCX can't be used."""
        api = _module()
        _hush()
        try:
            config = api.nixl_agent_config(
                enable_prog_thread=serves,
                backends=[_BACKEND],
                sync_mode=api.nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
            )
            self._agent = api.nixl_agent(secrets.token_hex(16), config)
        except Exception as error:
            raise ConfigError(f"NIXL can't make an agent with {_BACKEND}: {error!r}") from None
        if _BACKEND not in self._agent.backends:
            raise ConfigError(f"NIXL has no {_BACKEND} here")
        self._remote: Any = None
        self._registered: list[Any] = []
        self._stuck: list[Any] = []
        self._lent: list[Scratch] = []

    def register(self, address: int, size: int) -> None:
        """Lets this memory be read by peers that know of it, and be written by reads of its own, until the agent is
        gone. So long the caller keeps it."""
        self._register(address, size)

    @contextmanager
    def lend(self, size: int) -> Iterator[Scratch]:
        """Memory for the reads inside. Where one fails it stays until the agent is gone: it may still be written."""
        scratch = Scratch(size)
        handle = self._register(scratch.address, size)
        self._lent.append(scratch)
        yield scratch
        self._registered.remove(handle)
        self._agent.deregister_memory(handle)
        self._lent.remove(scratch)

    def metadata(self) -> bytes:
        """What a peer must know to read what is registered by now."""
        return bytes(self._agent.get_agent_metadata())

    def meet(self, metadata: bytes) -> None:
        """Reads are from the agent of this metadata from now on."""
        failure = ""
        try:
            self._remote = self._agent.add_remote_agent(metadata)
        except Exception as error:
            failure = f"its metadata make no sense: {error!r}"
        if failure:
            raise NixlFailed(failure)

    def read(self, pieces: Sequence[Piece], seconds: float, given_up: Callable[[], bool]) -> None:
        """Returns once all the bytes are here. Raises NixlFailed where they are not within `seconds`, the peer is gone,
        or `given_up` says so; some may be on their way still."""
        deadline, handle, failure = time.monotonic() + seconds, None, ""
        try:
            handle = self._begin(pieces)
            state, pause = self._agent.transfer(handle), _LEAST_PAUSE
            while state == "PROC" and not failure:
                time.sleep(pause)
                pause = min(2 * pause, _MOST_PAUSE)
                state = self._agent.check_xfer_state(handle)
                if time.monotonic() > deadline:
                    failure = f"no answer within {seconds:g} s"
                elif given_up():
                    failure = "another read of this agent failed"
            if state == "DONE":
                failure = ""
            elif state != "PROC":
                failure = f"the read ended as {state}"
        except Exception as error:  # NIXL raises what its bindings happen to, a lost peer among it
            failure = f"the read failed: {error!r}"
        if handle is not None:
            self._release(handle)
        # No traceback goes on with it: NIXL's own frames would keep the handle, and it the agent.
        handle = None
        if failure:
            raise NixlFailed(failure)

    def destroy(self) -> bool:
        """Takes the agent down, so that nothing of it can touch memory any more. False where that can't be told: then
        it may, for as long as this process lives."""
        agent, self._agent = self._agent, None
        if self._remote is not None:
            _try(agent.remove_remote_agent, self._remote)
        while self._registered:
            _try(agent.deregister_memory, self._registered.pop())
        # What must go is the object behind NIXL's Python, and only references to it show whether it will.
        if self._stuck or sys.getrefcount(agent.agent) > _OWN_REFERENCES:
            log.error("a NIXL agent can't be taken down: a read of it does not end")
            _kept.append(agent)
            return False
        watch = weakref.ref(agent)
        del agent
        if watch() is not None:
            log.error("a NIXL agent can't be taken down: something holds on to it")
            return False
        self._lent.clear()
        return True

    def _register(self, address: int, size: int) -> Any:
        failure = ""
        try:
            handle = self._agent.register_memory([(address, size, 0, "")], _KIND)
        except Exception as error:
            failure = f"{size} bytes can't be registered: {error!r}"
        if failure:
            raise NixlFailed(failure)
        self._registered.append(handle)
        return handle

    def _begin(self, pieces: Sequence[Piece]) -> Any:
        local = self._agent.get_xfer_descs([(piece.local, piece.size, 0) for piece in pieces], _KIND)
        remote = self._agent.get_xfer_descs([(piece.remote, piece.size, 0) for piece in pieces], _KIND)
        return self._agent.initialize_xfer("READ", local, remote, self._remote, backends=[_BACKEND])

    def _release(self, handle: Any) -> None:
        try:
            self._agent.release_xfer_handle(handle)
        except Exception as error:
            log.warning("a read that was given up can't be cancelled: %r", error)
            self._stuck.append(handle)


_kept: list[Any] = []
"""Agents that could not be taken down; to drop them would be to free what they may still use."""


def _try(step: Callable[[Any], object], what: Any) -> None:
    """The peer may be gone, and the agent goes all the same."""
    try:
        step(what)
    except Exception as error:
        log.debug("while a NIXL agent was taken down: %r", error)


def _hush() -> None:
    """NIXL's Python prints to stdout, which is where `baton` says what others read."""
    logger = logging.getLogger("nixl")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(logging.WARNING)
