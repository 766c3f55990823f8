"""The other process of `baton bench transfer`: a source whose blocks all may be read, and a bare socket beside it.

`python -m bench.transfer_source NUM_BLOCKS BLOCK_BYTES CHUNK` says on stdout, as one line of JSON, where it is found,
under which transfer id, and the checksum of every block. The bare socket gives CHUNK blocks at a time. It ends with its
stdin.
"""

from __future__ import annotations

import json
import random
import socket
import sys
import threading

from baton.ids import new_transfer_id
from kvtransfer.gate import Gate, ReadPermit, ReadPermits
from kvtransfer.memory import HostMemory
from kvtransfer.transports.shm import shm_endpoint
from kvtransfer.transports.tcp_server import TcpServer

GENERATION = 1


def main(num_blocks: int, block_bytes: int, chunk: int) -> None:
    memory, permits, transfer_id = HostMemory.create(num_blocks, block_bytes), ReadPermits(), new_transfer_id()
    noise = random.Random(0).randbytes(block_bytes)
    permit = ReadPermit(Gate())
    for index in range(num_blocks):
        memory.write(index, memoryview(noise[index:] + noise[:index]))
        memory.generations[index] = GENERATION
        permit.allow(index, GENERATION)
    permits.grant(transfer_id, permit)
    server = TcpServer(memory, permits)
    bare = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=_serve_bare, args=(bare, memory, chunk), daemon=True).start()
    told = {
        "fd": memory.fd,
        "nonce": memory.nonce.hex(),
        "shm": shm_endpoint(memory).address.hex(),
        "tcp": server.endpoint().address.hex(),
        "bare": bare.getsockname()[1],
        "transfer_id": transfer_id.hex(),
        "checksums": memory.checksums(range(num_blocks)),
    }
    print(json.dumps(told), flush=True)
    sys.stdin.read()
    server.close()


def _serve_bare(listener: socket.socket, memory: HostMemory, chunk: int) -> None:
    """For each four bytes, the number of a block, that block and those behind it: as plain as a socket can be."""
    sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while asked := sock.recv(4, socket.MSG_WAITALL):
        sock.sendall(memory.read(int.from_bytes(asked, "little"), chunk))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
