"""What only the fake network does: faults, drawn from a seed."""

from __future__ import annotations

from baton.ids import TransferId
from kvtransfer.gate import Gate, ReadPermit, ReadPermits
from kvtransfer.transports.base import Want
from kvtransfer.transports.fake import FakeNetwork, Faults
from tests.kvtransfer.rig import make_pool


async def test_fake_faults_repeat_with_their_seed() -> None:
    async def run(seed: int) -> tuple[list[float], bytes]:
        waits: list[float] = []

        async def sleep(seconds: float) -> None:
            waits.append(seconds)

        network = FakeNetwork(seed, Faults(delay=3, corrupt=0.3, duplicate=0.3), sleep)
        source, destination, permits = make_pool(), make_pool(), ReadPermits()
        permit, transfer_id = ReadPermit(Gate()), TransferId(bytes(16))
        permits.grant(transfer_id, permit)
        for index in range(20):
            permit.allow(index, 0)
        connection = network.connect(network.add("s", source, permits).endpoint().address, destination)
        await connection.fetch(transfer_id, [Want(i, 0, i) for i in range(20)], Gate())
        return waits, bytes(destination.blocks)

    first, again, other = await run(1), await run(1), await run(2)
    assert first == again
    assert first != other
    assert len(first[0]) > 20  # some were sent twice
    assert any(first[1])  # some were damaged
