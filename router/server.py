"""One router process: opens its doors, keeps its health, drains. Owns the life of all parts, and no request.

    Redis ──► directory ──► worker sessions ──► relay ──► gRPC door, HTTP door

SIGTERM or SIGINT: health turns NOT_SERVING, new requests are refused, open streams may end within `drain_seconds`.
A second signal ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable
from contextlib import AsyncExitStack

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1.health import aio as health_aio
from grpc_reflection.v1alpha import reflection

from baton.clock import MonotonicClock
from baton.config import RouterConfig
from baton.errors import PortInUse
from baton.metrics import Metrics, RouterMetrics
from baton.rpc import LIVENESS
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

SERVICE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
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
        self._health = health_aio.HealthServicer()
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
        health = asyncio.create_task(self._keep_health(), name="health")
        self._closing.push_async_callback(_cancelled, health)

    async def _start_grpc(self, service: InferenceService) -> None:
        server = grpc.aio.server(interceptors=[ErrorInterceptor()], options=server_options(self.config))
        inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (SERVICE, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        host, port = self.config.host, self.config.grpc_port
        try:
            bound = server.add_insecure_port(f"{host}:{port}")
        except RuntimeError as error:
            raise PortInUse(
                f"cannot listen on {host}:{port} (--grpc-port): {error}; the port must be free, or 0 to pick one"
            ) from None
        await server.start()
        self._closing.push_async_callback(server.stop, _CLOSE_SECONDS)
        self.grpc_address = f"{host}:{bound}"

    async def _start_http(self) -> None:
        door = await start_http(
            self.relay,
            self.relay.loaded_tokenizer,
            self.metrics,
            host=self.config.host,
            port=self.config.http_port,
            max_body_bytes=self.config.max_message_bytes,
            drain_seconds=_CLOSE_SECONDS,
        )
        self._closing.push_async_callback(door.stop)
        self.http_address = f"{door.host}:{door.port}"

    async def _keep_health(self) -> None:
        await self._health.set(LIVENESS, health_pb2.HealthCheckResponse.SERVING)
        while True:
            serving = not self.relay.ready()
            status = health_pb2.HealthCheckResponse.SERVING if serving else health_pb2.HealthCheckResponse.NOT_SERVING
            for name in ("", SERVICE):
                await self._health.set(name, status)
            self._router_metrics.redis_up.set(self.relay.redis_connected)
            await self.workers.wait_change(_HEALTH_SECONDS)

    async def drain(self) -> None:
        """Open requests may end; new ones are refused."""
        await self._health.enter_graceful_shutdown()
        if not await self.relay.drain(self.config.drain_seconds):
            _log.warning(
                "%d requests did not end within %g s (--drain-seconds); they are cut off",
                self.relay.open_requests,
                self.config.drain_seconds,
            )

    async def stop(self) -> None:
        await self._closing.aclose()


def server_options(config: RouterConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # a port in use is an error, not a second listener
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.keepalive_time_ms", 20_000),  # finds clients that went away without a word
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.http2.ping_timeout_ms", 10_000),
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", -1),
    ]


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
