"""The source's side of the nixl transport: its pool, registered, and the address by which a puller reads it.

The source has no part in what follows and does not know who reads. Nothing is refused for not being sealed or not of
the set that was claimed, no gate of the source waits for a read, and whoever has the endpoint can read the whole pool,
as with shm; and, for so NIXL registers memory, write into it. It is for networks on which only workers are. A reader
that asks honestly is safe all the same: what it may ask for, in which generation and with which checksum, it has from
the announcement, and what it got is compared with that.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from baton.errors import ConfigError, TransferRefused
from kvtransfer.checksum import xxh3_checksum
from kvtransfer.memory import HostMemory, PoolShape
from kvtransfer.transports.base import MAX_ADDRESS_BYTES, Endpoint
from kvtransfer.transports.nixl_agent import NAME, NixlAgent, NixlFailed

_ADDRESS = struct.Struct("<HxxxxxxQQQ16sQ")  # version, address, num_blocks, block_bytes, nonce, checksum of the rest
_VERSION = 1
_MAX_ADDRESS = 1 << 64


class NixlSource:
    def __init__(self, memory: HostMemory) -> None:
        """Raises ConfigError where NIXL can't be used."""
        self._memory = memory  # which must not go before the agent
        self._agent: NixlAgent | None = NixlAgent(serves=True)
        shape = memory.shape
        try:
            self._agent.register(memory.address, shape.bytes)
        except NixlFailed as error:
            self.close()
            raise ConfigError(f"--transport nixl: the KV pool can't be given to NIXL: {error}") from None
        metadata = self._agent.metadata()
        address = NixlPeer(memory.address, shape, memory.nonce, metadata).pack()
        if len(address) > MAX_ADDRESS_BYTES:
            self.close()
            raise ConfigError(
                f"--transport nixl: NIXL's metadata are {len(metadata)} bytes, which is more than peers accept; "
                "let UCX_NET_DEVICES name fewer devices"
            )
        self._endpoint = Endpoint(NAME, address)

    def endpoint(self) -> Endpoint:
        return self._endpoint

    def close(self) -> None:
        """Nobody can read any more."""
        agent, self._agent = self._agent, None
        if agent is not None:
            agent.destroy()


class NixlPeer(NamedTuple):
    """A source's pool, as its address tells."""

    address: int
    shape: PoolShape
    nonce: bytes
    metadata: bytes

    @classmethod
    def parse(cls, address: bytes) -> NixlPeer:
        """Raises TransferRefused. What is damaged gets no further: NIXL reads the metadata by code of its own, and some
        networks read whatever address they are told."""
        if len(address) <= _ADDRESS.size:
            raise TransferRefused(f"a nixl address has more than {_ADDRESS.size} bytes, not {len(address)}")
        version, start, num_blocks, block_bytes, nonce, _ = _ADDRESS.unpack_from(address)
        if version != _VERSION:
            raise TransferRefused(f"the nixl address has version {version}, not {_VERSION}")
        shape, metadata = PoolShape(num_blocks, block_bytes), address[_ADDRESS.size :]
        shape.check("the nixl address")
        if start + shape.bytes > _MAX_ADDRESS:
            raise TransferRefused(f"the nixl address tells of {shape.bytes} bytes at {start:#x}")
        peer = cls(start, shape, nonce, metadata)
        if peer.pack() != address:
            raise TransferRefused("the nixl address is damaged")
        return peer

    def pack(self) -> bytes:
        head = (_VERSION, self.address, *self.shape, self.nonce)
        checksum = xxh3_checksum(_ADDRESS.pack(*head, 0) + self.metadata)
        return _ADDRESS.pack(*head, checksum) + self.metadata
