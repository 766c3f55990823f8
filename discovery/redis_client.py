"""Opens the connection to Redis, and says clearly what is wrong when there is none to be had.

Passwords appear in no message and no log.
"""

from __future__ import annotations

import asyncio
import logging
import re
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    BusyLoadingError,
    InvalidResponse,
    NoPermissionError,
    RedisError,
    ResponseError,
)

from baton.clock import Clock, MonotonicClock
from baton.errors import RedisUnreachable
from discovery.outage import describe

log = logging.getLogger(__name__)

_SCHEMES = ("redis", "rediss", "unix")
_DATABASE = re.compile(r"/?|/[0-9]+")
_MAX_CONNECTIONS = 32


async def connect(
    url: str, *, timeout_seconds: float = 1.0, patience_seconds: float = 5.0, clock: Clock | None = None
) -> Redis:
    """A client whose server has answered; the caller closes it with `aclose`.

    A server that is not there yet is waited for, `patience_seconds` long; what time will not mend (a bad URL, a
    wrong password, another kind of server) fails at once. `timeout_seconds` bounds each try, now and later, to open a
    connection; commands have no timeout but that of whoever sends them. Raises RedisUnreachable.
    """
    clock = clock or MonotonicClock()
    client = _client(url, timeout_seconds)
    deadline = clock.now() + patience_seconds
    next_word = clock.now()
    try:
        while True:
            try:
                async with asyncio.timeout(2 * timeout_seconds):
                    await client.ping()
                return client
            except (RedisError, OSError, TimeoutError) as error:
                now = clock.now()
                if _is_final(error) or now >= deadline:
                    raise RedisUnreachable(_verdict(url, error)) from None
                if now >= next_word:
                    next_word = now + 1.0
                    log.info("waiting for Redis at %s: %s", redact(url), describe(error))
            await asyncio.sleep(min(0.1, max(0.0, deadline - clock.now())))
    except BaseException:
        await client.aclose()
        raise


def redact(url: str) -> str:
    """The URL without its password, whatever else is wrong with it."""
    scheme, separator, rest = url.partition("://")
    if not separator:
        scheme, rest = "", url
    userinfo, at, place = rest.rpartition("@")
    if at:
        user, colon, _ = userinfo.partition(":")
        rest = f"{user}:***@{place}" if colon else f"***@{place}"
    return f"{scheme}{separator}" + re.sub(r"(?i)(password=)[^&]*", r"\1***", rest)


def _client(url: str, timeout_seconds: float) -> Redis:
    right = "it must be redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], rediss:// for TLS, or unix://PATH"
    scheme = url.partition("://")[0].lower()
    try:
        parts = urlsplit(url)
        if scheme == "unix":
            complete = bool(parts.path)
        else:
            complete = bool(parts.hostname) and parts.port != 0 and _DATABASE.fullmatch(parts.path) is not None
        if "://" not in url or scheme not in _SCHEMES or not complete:
            raise ValueError
        pool = BlockingConnectionPool.from_url(
            url,
            protocol=2,
            max_connections=_MAX_CONNECTIONS,
            timeout=timeout_seconds,
            # Who asks keeps time, around the whole of a question. (With a socket timeout the client would send through
            # asyncio.wait_for, which in Python 3.11 can swallow a cancellation, and with it the asker's own timeout.)
            socket_timeout=None,
            socket_connect_timeout=timeout_seconds,
            # An answer that is late is of no use here: nothing is tried twice behind the asker's back.
            retry=Retry(NoBackoff(), 0),
        )
    except ValueError:  # its text may hold the password
        raise RedisUnreachable(f"Redis URL is {redact(url)!r}; {right}") from None
    return Redis.from_pool(pool)


def _is_final(error: Exception) -> bool:
    if isinstance(error, BusyLoadingError):
        return False
    return isinstance(error, AuthenticationError | AuthorizationError | InvalidResponse | ResponseError)


def _verdict(url: str, error: Exception) -> str:
    place = redact(url)
    if isinstance(error, AuthenticationError | AuthorizationError | NoPermissionError) or "NOAUTH" in str(error):
        return f"Redis at {place} refused the log-in ({error}); the URL must carry its USER:PASSWORD@"
    if isinstance(error, InvalidResponse):
        return f"what answers at {place} is not Redis; the URL must name a Redis or Valkey server"
    if isinstance(error, ResponseError):
        return f"Redis at {place} refused ({error}); the URL must name a database that may be used"
    return f"Redis at {place} is unreachable ({describe(error)}); a Redis or Valkey server must be running there"
