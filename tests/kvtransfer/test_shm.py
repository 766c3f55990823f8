"""What only shm does: it proves that the source is of this host and is the one that was offered."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from baton.errors import TransferRefused
from kvtransfer.threads import Threads
from kvtransfer.transports.shm import ShmConnection, shm_endpoint
from tests.kvtransfer.rig import make_pool


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads.create()
    yield threads
    threads.close()


async def test_shm_refuses_addresses_that_are_not_of_this_host(threads: Threads) -> None:
    source, destination = make_pool(), make_pool()
    address = bytearray(shm_endpoint(source).address)
    for spoil, complaint in (
        (slice(16, 17), "another host"),
        (slice(0, 1), "version"),
        (slice(40, 41), "another pool"),
    ):
        spoiled = bytearray(address)
        spoiled[spoil] = bytes([spoiled[spoil.start] ^ 1])
        with pytest.raises(TransferRefused, match=complaint):
            await ShmConnection.connect(bytes(spoiled), destination, threads.memory)
    with pytest.raises(TransferRefused, match="has 48 bytes, not 3"):
        await ShmConnection.connect(b"abc", destination, threads.memory)
