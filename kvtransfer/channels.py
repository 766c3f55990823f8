"""The puller's gRPC channels, one to a source's address, kept for the next pull."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio

from baton.rpc import CHANNEL_OPTIONS, OpenChannel, open_channel

_MAX_CHANNELS = 128


class _Shared:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.users = 0
        self.forgotten = False


class Channels:
    def __init__(self, open_channel: OpenChannel = open_channel) -> None:
        self._open_channel = open_channel
        self._channels: OrderedDict[str, _Shared] = OrderedDict()

    @asynccontextmanager
    async def to(self, address: str) -> AsyncIterator[grpc.aio.Channel]:
        """The channel, which stays open at least as long as the block."""
        shared = self._channels.get(address)
        if shared is None:
            shared = self._channels[address] = _Shared(self._open_channel(address, CHANNEL_OPTIONS))
        self._channels.move_to_end(address)
        shared.users += 1
        try:
            yield shared.channel
        finally:
            shared.users -= 1
            if shared.forgotten and not shared.users:
                await shared.channel.close()
            await self._trim()

    def forget(self, address: str) -> None:
        """The peer was lost: the next pull gets a new channel. Pulls under way keep theirs."""
        shared = self._channels.get(address)
        if shared is not None and shared.users:
            shared.forgotten = True
            del self._channels[address]

    async def close(self) -> None:
        while self._channels:
            _, shared = self._channels.popitem()
            await shared.channel.close()

    async def _trim(self) -> None:
        unused = [address for address, shared in self._channels.items() if not shared.users]
        for address in unused[: max(0, len(self._channels) - _MAX_CHANNELS)]:
            await self._channels.pop(address).channel.close()
