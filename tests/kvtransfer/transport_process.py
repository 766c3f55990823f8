"""A source of one transport in a process of its own, to be stopped and killed:
`python -m tests.kvtransfer.transport_process TRANSPORT` says where it is, as JSON, and ends with its stdin."""

from __future__ import annotations

import json
import sys

from baton.ids import new_transfer_id
from kvtransfer.gate import Gate, ReadPermit, ReadPermits
from kvtransfer.memory import HostMemory
from tests.kvtransfer.transport_rigs import RIGS

NUM_BLOCKS, BLOCK_BYTES = 64, 256 << 10
GENERATION = 3


def block(index: int) -> bytes:
    return (index * 1_000_003 + 1).to_bytes(8, "little") * (BLOCK_BYTES // 8)


def main(transport: str) -> None:
    memory, permits, transfer_id = HostMemory.create(NUM_BLOCKS, BLOCK_BYTES), ReadPermits(), new_transfer_id()
    permit = ReadPermit(Gate())
    permits.grant(transfer_id, permit)
    for index in range(NUM_BLOCKS):
        memory.write(index, memoryview(block(index)))
        memory.generations[index] = GENERATION
        permit.allow(index, GENERATION)
    rig = RIGS[transport]()
    endpoint = rig.serve(memory, permits)
    print(json.dumps({"address": endpoint.address.hex(), "transfer_id": transfer_id.hex()}), flush=True)
    sys.stdin.read()
    rig.close()


if __name__ == "__main__":
    main(sys.argv[1])
