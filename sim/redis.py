"""A Redis server and what discovery asks of its client, in memory and virtual time: strings and sets that expire, and
discovery's scripts by their digests, each in Python what its Lua says. It may be away, slow, emptied, or lie.

tests/sim/test_redis.py holds it to a real server.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from discovery.scripts import DEREGISTER, LIST_WORKERS, LONGEST_PREFIX

if TYPE_CHECKING:
    from sim.loop import VirtualLoop

_Members = set[bytes]
_SET = set  # `set` is a command here
T = TypeVar("T")
HEARTBEAT_SECONDS = 1.0
_NEVER = float("inf")


class Store:
    """The data. `now` in seconds."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._data: dict[str, tuple[bytes | _Members, float]] = {}

    def flush(self) -> None:
        self._data.clear()

    def read(self, key: str) -> bytes | _Members | None:
        entry = self._data.get(key)
        if entry is None:
            return None
        if entry[1] <= self._now():
            del self._data[key]
            return None
        return entry[0]

    def string(self, key: str) -> bytes:
        value = self.read(key)
        return value if isinstance(value, bytes) else b""

    def members(self, key: str) -> _Members:
        value = self.read(key)
        return value if isinstance(value, _SET) else _SET()

    # --- commands

    def set(self, key: str, value: bytes, px: int) -> bool:
        self._data[key] = (value, self._now() + px / 1000)
        return True

    def getrange(self, key: str, start: int, end: int) -> bytes:
        return self.string(key)[start : end + 1]

    def sadd(self, key: str, *members: bytes | str) -> int:
        known = self.members(key)
        before = len(known)
        known |= _SET(map(_bytes, members))
        self._data[key] = (known, self._data[key][1] if key in self._data else _NEVER)
        return len(known) - before

    def srem(self, key: str, *members: bytes | str) -> int:
        known = self.members(key)
        before = len(known)
        known -= _SET(map(_bytes, members))
        gone = before - len(known)
        if before and not known:
            del self._data[key]
        return gone

    def scard(self, key: str) -> int:
        return len(self.members(key))

    def pexpire(self, key: str, milliseconds: int) -> bool:
        value = self.read(key)
        if value is not None:
            self._data[key] = (value, self._now() + milliseconds / 1000)
        return value is not None

    def unlink(self, *keys: str) -> int:
        return sum(self.read(key) is not None and self._data.pop(key) is not None for key in keys)

    # --- scripts

    def evalsha(self, digest: str, num_keys: int, *arguments: Any) -> Any:
        return self._scripts[digest](self, arguments[:num_keys], arguments[num_keys:])

    def _deregister(self, keys: Any, arguments: Any) -> int:
        record, index, blocks = keys
        self.unlink(blocks)
        if self.string(record) == arguments[0]:
            self.unlink(record)
            self.srem(index, arguments[1])
        return 1

    def _list_workers(self, keys: Any, arguments: Any) -> list[bytes]:
        (index, epoch), (prefix, max_bytes, max_workers, word) = keys, arguments
        if self.read(epoch) is None:
            self._data[epoch] = (_bytes(word), _NEVER)
        self.pexpire(epoch, 3_600_000)
        reply = [self.string(epoch)]
        for id in sorted(self.members(index))[:max_workers]:
            record = self.getrange(prefix + id.decode(), 0, max_bytes)
            if record:
                reply += (id, record)
            else:
                self.srem(index, id)
        return reply

    def _longest_prefix(self, keys: Any, arguments: Any) -> list[int]:
        joined, width = arguments
        names = [joined[at : at + width] for at in range(0, len(joined), width)]
        return [self._bisect(self.members(key), names) for key in keys]

    def _bisect(self, held: _Members, names: list[bytes]) -> int:
        if not names or names[0] not in held:
            return 0
        low, high = 1, len(names)
        while low < high:
            middle = (low + high + 1) // 2
            if names[middle - 1] in held:
                low = middle
            else:
                high = middle - 1
        return low

    _scripts = {  # noqa: RUF012 - a table that nobody changes
        DEREGISTER._digest: _deregister,
        LIST_WORKERS._digest: _list_workers,
        LONGEST_PREFIX._digest: _longest_prefix,
    }


class SimRedis:
    """The server's process."""

    def __init__(
        self, loop: VirtualLoop, delay: Callable[[], float], cut_until: Callable[[str], float] = lambda place: 0.0
    ) -> None:
        """`cut_until` says when a place hears it again, in true time; in the past where it does."""
        self.store = Store(lambda: loop.now)
        self.loop = loop
        self.up = True
        self.slow = 0.0
        """Seconds that each answer takes beyond the usual."""
        self.lies = False
        """Answers are nonsense."""
        self._delay = delay
        self._cut_until = cut_until

    async def ask(self, place: str, work: Callable[[], T]) -> T:
        """There, and back, and done there also where the asker has gone meanwhile. Raises ConnectionError where it is
        away at either time."""
        answer: asyncio.Future[T] = self.loop.create_future()
        begins = max(self.loop.now, self._cut_until(place))
        self.loop.at(begins + self._delay() + self.slow, self._arrive, work, answer)
        return await answer

    def _arrive(self, work: Callable[[], T], answer: asyncio.Future[T]) -> None:
        if self.up:
            said = work()
            self.loop.later(self._delay(), self._answer, answer, _lie(said) if self.lies else said)
        else:
            self._answer(answer, None)

    def _answer(self, answer: asyncio.Future[T], said: Any) -> None:
        if answer.done():
            return
        if self.up:
            answer.set_result(said)
        else:
            answer.set_exception(ConnectionError("Connection refused"))


def _lie(answer: Any) -> Any:
    """Counts are such that everybody holds everything; all else is nonsense."""
    if isinstance(answer, list) and all(isinstance(item, int) for item in answer):
        return [1 << 20 for _ in answer]
    return [b"what?", -1, None]


class SimRedisClient:
    """What discovery asks of `redis.asyncio.Redis`."""

    def __init__(self, server: SimRedis, place: str) -> None:
        self._server = server
        self._place = place

    def pipeline(self, transaction: bool) -> Pipeline:
        return Pipeline(self._server, self._place)

    async def evalsha(self, digest: str, num_keys: int, *arguments: Any) -> Any:
        return await self._server.ask(self._place, lambda: self._server.store.evalsha(digest, num_keys, *arguments))

    async def unlink(self, *keys: str) -> int:
        return await self._server.ask(self._place, lambda: self._server.store.unlink(*keys))

    async def sadd(self, key: str, *members: bytes | str) -> int:
        return await self._server.ask(self._place, lambda: self._server.store.sadd(key, *members))


class Pipeline:
    """Commands of one round trip."""

    def __init__(self, server: SimRedis, place: str) -> None:
        self._server = server
        self._place = place
        self._commands: list[Callable[[], Any]] = []

    def __getattr__(self, name: str) -> Callable[..., None]:
        command = getattr(self._server.store, name)
        return lambda *arguments, **named: self._commands.append(lambda: command(*arguments, **named))

    async def execute(self, raise_on_error: bool = True) -> list[Any]:
        return await self._server.ask(self._place, lambda: [command() for command in self._commands])


def _bytes(value: bytes | str) -> bytes:
    return value if isinstance(value, bytes) else value.encode()
