"""Lua scripts that run inside Redis, each in one round trip."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from redis.asyncio import Redis
from redis.exceptions import NoScriptError


class Script:
    """A .lua file of this package, called by its digest. Sent in full only where Redis does not know it."""

    def __init__(self, name: str) -> None:
        self._source = files("discovery").joinpath(f"{name}.lua").read_text()
        self._digest = hashlib.sha1(self._source.encode(), usedforsecurity=False).hexdigest()  # how Redis names scripts

    async def __call__(self, redis: Redis, keys: Sequence[str], *args: bytes | str | int) -> Any:
        try:
            return await redis.evalsha(self._digest, len(keys), *keys, *args)
        except NoScriptError:  # a new or flushed server
            return await redis.eval(self._source, len(keys), *keys, *args)


LONGEST_PREFIX = Script("longest_prefix")
LIST_WORKERS = Script("list_workers")
DEREGISTER = Script("deregister")
