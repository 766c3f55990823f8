"""A source in a process of its own, to be stopped and killed: `python -m tests.kvtransfer.source_process TRANSPORT`.

It offers 40 blocks, prints the ticket in hex, and seals up to the position that each line of its stdin says; -1 says
that the prompt is prefilled.
"""

from __future__ import annotations

import asyncio
import sys

import grpc.aio

from baton.clock import MonotonicClock
from baton.config import TransferConfig
from baton.ids import AttemptId, new_incarnation
from baton.metrics import Metrics, TransferMetrics
from kvtransfer import HostMemory, TransferNode
from tests.kvtransfer.rig import LAYOUT, SOURCE_ID, fill, take

NUM_BLOCKS = 40
FIRST_TOKEN = 4242


async def main(transport: str) -> None:
    memory = HostMemory.create(64, LAYOUT.block_bytes)
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    node = TransferNode(
        memory=memory,
        layout=LAYOUT,
        worker_id=SOURCE_ID,
        incarnation=new_incarnation(),
        address=f"127.0.0.1:{port}",
        host="127.0.0.1",
        config=TransferConfig(transport=transport, lease_seconds=1.0),
        on_terminal=lambda id: print(f"ended {id}", flush=True),
        clock=MonotonicClock(),
        metrics=TransferMetrics(Metrics()),
    )
    node.add_to(server)
    await server.start()
    node.start()
    id = AttemptId("req-1", 0)
    blocks = take(memory, range(10, 10 + NUM_BLOCKS))
    fill(memory, blocks)
    print(node.ledger.offer(id, blocks, NUM_BLOCKS * 16).to_proto().SerializeToString().hex(), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        end = int(line)
        if end < 0:
            node.ledger.prefilled(id, FIRST_TOKEN)
        else:
            node.ledger.seal(id, end)
    await server.stop(None)
    await node.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
