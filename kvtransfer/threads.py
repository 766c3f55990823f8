"""The threads that touch bytes, so that the event loop never does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass


@dataclass(frozen=True)
class Threads:
    memory: ThreadPoolExecutor
    """For copies within this host and for checksums: as many as memory bandwidth can use, no more."""
    network: ThreadPoolExecutor
    """For fetches over sockets. They wait most of their time, so a silent peer must not take the place of others."""

    @classmethod
    def create(cls, *, memory: int = 2, network: int = 16) -> Threads:
        return cls(
            ThreadPoolExecutor(memory, thread_name_prefix="kvtransfer-memory"),
            ThreadPoolExecutor(network, thread_name_prefix="kvtransfer-fetch"),
        )

    def close(self) -> None:
        """Takes no more work and drops what has not begun. Does not wait: what runs has timeouts of its own."""
        self.memory.shutdown(wait=False, cancel_futures=True)
        self.network.shutdown(wait=False, cancel_futures=True)
