"""A source in a process of its own, to be stopped and killed: `python -m tests.kvtransfer.source_process TRANSPORT`.

It offers 40 blocks, prints the ticket in hex, and seals up to the position that each line of its stdin says; -1 says
that the prompt is prefilled.
"""

from __future__ import annotations

import asyncio
import sys

import grpc.aio

from baton.clock import MonotonicClock
from baton.ids import AttemptId, new_incarnation
from baton.metrics import Metrics, TransferMetrics
from baton.v1.transfer_pb2_grpc import add_TransferServicer_to_server
from kvtransfer import HostMemory, SourceLedger, TransferService
from kvtransfer.gate import ReadPermits
from kvtransfer.threads import Threads
from tests.kvtransfer.rig import LAYOUT, SOURCE_ID, fill, take
from tests.kvtransfer.transport_rigs import RIGS

NUM_BLOCKS = 40
FIRST_TOKEN = 4242


def lease_seconds(transport: str) -> float:
    """Longer than it takes to connect."""
    return 5.0 if transport == "nixl" else 1.0


async def main(transport: str) -> None:
    memory, permits, threads = HostMemory.create(64, LAYOUT.block_bytes), ReadPermits(), Threads.create()
    metrics = TransferMetrics(Metrics())
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    ledger = SourceLedger(
        memory=memory,
        layout=LAYOUT,
        worker_id=SOURCE_ID,
        address=f"127.0.0.1:{port}",
        incarnation=new_incarnation(),
        lease_seconds=lease_seconds(transport),
        on_terminal=lambda id: print(f"ended {id}", flush=True),
        clock=MonotonicClock(),
        metrics=metrics,
        executor=threads.memory,
        permits=permits,
    )
    rig = RIGS[transport]()
    endpoint = rig.serve(memory, permits)
    add_TransferServicer_to_server(TransferService(ledger, lambda: [endpoint], metrics), server)
    await server.start()
    reaper = asyncio.create_task(ledger.run_reaper())
    id = AttemptId("req-1", 0)
    blocks = take(memory, range(10, 10 + NUM_BLOCKS))
    fill(memory, blocks)
    print(ledger.offer(id, blocks, NUM_BLOCKS * 16).to_proto().SerializeToString().hex(), flush=True)
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.readline):
        end = int(line)
        if end < 0:
            ledger.prefilled(id, FIRST_TOKEN)
        else:
            ledger.seal(id, end)
    reaper.cancel()
    await server.stop(None)
    rig.close()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
