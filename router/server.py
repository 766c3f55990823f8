"""One router process: opens its doors, keeps its health, drains. Owns the life of all parts, and no request.

    Redis ──► directory ──► worker sessions ──► relay ──► gRPC door, HTTP door

SIGTERM or SIGINT: health turns NOT_SERVING, new requests are refused, open streams may end within `drain_seconds`;
those that do not end with an error that says why. A second signal ends the wait.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack

import grpc

from baton.clock import MonotonicClock
from baton.config import RouterConfig
from baton.metrics import Metrics, RouterMetrics
from baton.rpc import Health, bind, server_options
from baton.v1 import inference_pb2, inference_pb2_grpc
from discovery import Directory as RedisDirectory
from discovery import connect
from router.http import start_http
from router.interceptor import ErrorInterceptor
from router.relay import Relay
from router.service import InferenceService
from router.session import SessionOptions
from router.text.tokenizer import Tokenizer
from router.workers import Directory, Workers

_log = logging.getLogger(__name__)

_HEALTH_SECONDS = 0.25
_CLOSE_SECONDS = 1.0
"""For answers on their way when the doors close."""


class RouterServer:
    """`start` it, and `stop` it whether that worked or not. The directory stays the caller's."""

    def __init__(
        self,
        config: RouterConfig,
        directory: Directory,
        session_options: SessionOptions | None = None,
        load_tokenizer: Callable[[str], Tokenizer] = Tokenizer.load,
    ) -> None:
        self.config = config
        self.metrics = Metrics()
        self.grpc_address = ""
        """`host:port`, once started."""
        self.http_address = ""
        self._router_metrics = RouterMetrics(self.metrics)
        clock = MonotonicClock()
        self.workers = Workers(directory, self._router_metrics, clock, session_options)
        self.relay = Relay(
            self.workers,
            config.routing,
            self.metrics,
            self._router_metrics,
            model=config.model,
            load_tokenizer=load_tokenizer,
            clock=clock,
        )
        self._health: Health | None = None
        self._closing = AsyncExitStack()

    async def start(self) -> None:
        """Raises PortInUse, naming the flag, and CheckpointError where `--model` has no tokenizer."""
        self._closing.push_async_callback(self.relay.close)
        if self.config.model:
            await self.relay.tokenizer()
        self._closing.push_async_callback(self.workers.stop)
        self.workers.start()
        self.relay.start()
        service = InferenceService(self.relay)
        await self._start_http()
        service.http_address = self.http_address
        await self._start_grpc(service)

    async def _start_grpc(self, service: InferenceService) -> None:
        config = self.config
        options = server_options(config.max_message_bytes)
        server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=options)
        inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
        self._health = Health(server, [inference_pb2.DESCRIPTOR])
        await self._health.set(False)
        port = bind(server, config.host, config.grpc_port)
        await server.start()
        self._closing.push_async_callback(server.stop, _CLOSE_SECONDS)
        self.grpc_address = f"{config.host}:{port}"
        keeping = asyncio.create_task(self._keep_health(self._health), name="health")
        self._closing.push_async_callback(_cancelled, keeping)

    async def _start_http(self) -> None:
        door = await start_http(
            self.relay,
            self.metrics,
            host=self.config.host,
            port=self.config.http_port,
            max_body_bytes=self.config.max_message_bytes,
            drain_seconds=_CLOSE_SECONDS,
        )
        self._closing.push_async_callback(door.stop)
        self.http_address = f"{door.host}:{door.port}"

    async def _keep_health(self, health: Health) -> None:
        while True:
            await health.set(not self.relay.ready())
            self._router_metrics.redis_up.set(self.relay.redis_connected)
            await self.workers.wait_change(_HEALTH_SECONDS)

    async def drain(self) -> None:
        """Open requests may end; new ones are refused."""
        self.relay.draining = True
        if self._health is not None:
            await self._health.set(False)
        if not await self.relay.drain(self.config.drain_seconds):
            _log.warning(
                "%d requests did not end within %g s (--drain-seconds); they are told so and cut off",
                self.relay.open_requests,
                self.config.drain_seconds,
            )

    async def stop(self) -> None:
        self.relay.cut_off()
        await self._closing.aclose()


async def serve(config: RouterConfig) -> None:
    """Runs a router until a signal ends it. Raises ConfigError where it cannot start."""
    stopping, at_once = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (at_once if stopping.is_set() else stopping).set()

    loop = asyncio.get_running_loop()
    redis = await connect(config.discovery.redis_url)
    heartbeat = config.discovery.heartbeat_seconds
    directory = RedisDirectory(
        redis,
        namespace=config.discovery.namespace,
        refresh_seconds=min(0.5, heartbeat),
        linger_seconds=3 * heartbeat,
    )
    server = RouterServer(config, directory)
    try:
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, on_signal)
        await directory.start()
        await server.start()
        print(f"baton router ready grpc={server.grpc_address} http={server.http_address}", flush=True)
        await stopping.wait()
        _log.info("draining: %d requests are open", server.relay.open_requests)
        draining = asyncio.create_task(server.drain())
        cut_off = asyncio.create_task(at_once.wait())
        await asyncio.wait({draining, cut_off}, return_when=asyncio.FIRST_COMPLETED)
        await _cancelled(draining)
        await _cancelled(cut_off)
    finally:
        await server.stop()
        await directory.stop()
        await redis.aclose()


async def _cancelled(task: asyncio.Task[object]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
