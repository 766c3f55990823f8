"""An open door on a free port, before a scripted core."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass

import aiohttp
import openai
import pytest

from baton.metrics import Metrics
from router.http import HttpDoor, start_http
from tests.http.fake_core import FakeCore

MAX_BODY_BYTES = 64 * 1024


@dataclass
class Served:
    door: HttpDoor
    core: FakeCore
    metrics: Metrics
    http: aiohttp.ClientSession
    openai: openai.AsyncOpenAI

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.door.port}"

    async def post(
        self, path: str, body: object = None, **options: object
    ) -> tuple[int, dict[str, object], aiohttp.ClientResponse]:
        """Status, JSON and the response itself."""
        if body is not None:
            options["json"] = body
        async with self.http.post(self.url + path, **options) as response:  # type: ignore[arg-type]  # passed on
            return response.status, await response.json(), response

    async def events(self, path: str, body: dict[str, object]) -> list[str]:
        """The data of each event of a stream."""
        async with self.http.post(self.url + path, json=body | {"stream": True}) as response:
            assert response.status == 200
            assert response.content_type == "text/event-stream"
            text = (await response.read()).decode()
        assert text.endswith("\n\n")
        lines = text.removesuffix("\n\n").split("\n\n")
        assert all(line.startswith("data: ") and "\n" not in line for line in lines)
        return [line.removeprefix("data: ") for line in lines]


@pytest.fixture
async def served() -> AsyncGenerator[Served, None]:
    core, metrics = FakeCore(), Metrics()
    door = await start_http(
        core,
        metrics,
        host="127.0.0.1",
        port=0,
        max_body_bytes=MAX_BODY_BYTES,
        drain_seconds=1.0,
        write_timeout_seconds=0.5,
    )
    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{door.port}/v1", api_key="none", max_retries=0)
    async with aiohttp.ClientSession() as session, client:
        yield Served(door, core, metrics, session, client)
    await door.stop()
    assert core.open == 0, "a generation was left open"
