from __future__ import annotations

import asyncio
import logging
import socket
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis

from baton.errors import RedisUnreachable
from discovery import EmbeddedRedis, connect, redact
from tests.discovery.conftest import eventually
from tests.discovery.makers import false_server

SECRET = "s3cr3t"


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://localhost:6379",
        "redis://",
        "redis://:6379",
        "redis://host:port",
        "redis://host:0",
        "redis://host:99999",
        "redis://host/first",
        "redis://[::1",
        "unix://",
        f"user:{SECRET}@host",
        f"redis://user:{SECRET}@host:port",
        f"redis://:{SECRET}/x@host",
        f"https://user:{SECRET}@host",
    ],
)
async def test_a_bad_url_is_refused_at_once_with_what_would_be_right(url: str) -> None:
    with pytest.raises(RedisUnreachable, match=r"Redis URL is .*; it must be redis://") as caught:
        await connect(url, patience_seconds=60.0)
    assert SECRET not in str(caught.value)


async def test_an_unreachable_server_is_named_after_the_patience() -> None:
    gone = EmbeddedRedis()
    gone.start()
    gone.stop()
    url = gone.url.replace("redis://", f"redis://baton:{SECRET}@")
    started = time.monotonic()
    with pytest.raises(RedisUnreachable) as caught:
        await connect(url, patience_seconds=0.3)
    assert time.monotonic() - started >= 0.3
    assert f"Redis at redis://baton:***@127.0.0.1:{gone.port}/0 is unreachable" in str(caught.value)
    assert "must be running there" in str(caught.value)
    assert SECRET not in str(caught.value)


async def test_a_server_that_comes_late_is_waited_for_and_the_wait_is_logged(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, logger="discovery")
    late = EmbeddedRedis()
    late.start()
    late.stop()
    connecting = asyncio.create_task(connect(late.url, patience_seconds=60.0))
    await eventually(lambda: "waiting for Redis at" in caplog.text, "the wait is logged")
    late.start()
    try:
        client = await connecting
        assert await client.ping()
        await client.aclose()
    finally:
        late.stop()


async def test_a_wrong_password_fails_at_once_and_is_not_shown(own_redis: Redis, own_server: EmbeddedRedis) -> None:
    await own_redis.config_set("requirepass", "right")
    for userinfo in ("", f":{SECRET}@", f"nobody:{SECRET}@"):
        url = own_server.url.replace("redis://", f"redis://{userinfo}")
        with pytest.raises(RedisUnreachable, match=r"refused the log-in .*USER:PASSWORD@") as caught:
            await connect(url, patience_seconds=60.0)
        assert SECRET not in str(caught.value)
    client = await connect(own_server.url.replace("redis://", "redis://:right@"))
    await client.aclose()


async def test_a_database_out_of_range_fails_at_once(server: EmbeddedRedis) -> None:
    with pytest.raises(RedisUnreachable, match=r"refused \(DB index is out of range\); the URL must name a database"):
        await connect(f"redis://127.0.0.1:{server.port}/9999", patience_seconds=60.0)


async def test_another_kind_of_server_fails_at_once() -> None:
    async with false_server(lambda command: b"HTTP/1.1 400 Bad Request\r\n\r\n") as url:
        with pytest.raises(RedisUnreachable, match=r"what answers at .* is not Redis"):
            await connect(url, patience_seconds=60.0)


async def test_a_server_that_says_nothing_is_given_up_in_time() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        started = time.monotonic()
        with pytest.raises(RedisUnreachable, match="no answer in time"):
            await connect(f"redis://127.0.0.1:{listener.getsockname()[1]}", timeout_seconds=0.1, patience_seconds=0.2)
        assert time.monotonic() - started < 10


@given(
    password=st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=12).map(
        lambda tail: SECRET + tail
    ),
    user=st.sampled_from(["", "user"]),
    place=st.sampled_from(["host", "host:6379/0", "[::1]:1", "host:bad", ""]),
)
def test_no_password_survives_redaction(password: str, user: str, place: str) -> None:
    shown = redact(f"redis://{user}:{password}@{place}")
    assert SECRET not in shown
    assert shown.endswith(place)


def test_a_password_in_the_query_is_redacted_too() -> None:
    assert redact(f"redis://host/0?db=1&password={SECRET}&x=1") == "redis://host/0?db=1&password=***&x=1"
    assert redact("redis://host:6379/0") == "redis://host:6379/0"
