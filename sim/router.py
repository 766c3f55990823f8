"""One life of one router's process: production's directory, sessions, relay and gRPC door, wired as in
router/server.py, with the simulator's network, Redis and tokenizer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from baton.config import RoutingConfig
from baton.metrics import RouterMetrics
from baton.v1 import inference_pb2_grpc
from discovery.directory import Directory
from router.interceptor import ErrorInterceptor
from router.relay import Relay
from router.service import InferenceService
from router.session import SessionOptions
from router.workers import Workers
from sim.figures import Figures
from sim.loop import Node
from sim.network import Server
from sim.redis import HEARTBEAT_SECONDS, SimRedisClient
from sim.scenario import RouterSpec
from sim.tokenizer import SimTokenizer

if TYPE_CHECKING:
    from sim.world import World

REQUEST_TIMEOUT = 120.0
_RESUME_TIMEOUT = 10.0
_GOODBYE_SECONDS = 0.1


def address_of(router: str) -> str:
    return f"{router}:1"


class RouterLife:
    """Starts in its own node's context."""

    def __init__(self, world: World, spec: RouterSpec, number: int) -> None:
        self.spec = spec
        self.number = number
        self.node = Node(spec.id, number, spec.clock_rate)
        self.booted = False
        self.draining = False
        self._world = world
        world.loop.call_soon(self._boot, context=self.node.context)

    def _boot(self) -> None:
        world, figures = self._world, Figures()
        self.metrics = RouterMetrics(figures)
        self.directory = Directory(
            cast(Any, SimRedisClient(world.redis, self.spec.id)),
            refresh_seconds=HEARTBEAT_SECONDS,
            linger_seconds=3 * HEARTBEAT_SECONDS,
            clock=world.clock,
        )
        self.workers = Workers(
            self.directory, self.metrics, world.clock, SessionOptions(), open_channel=world.network.open_channel
        )
        self.relay = Relay(
            self.workers,
            RoutingConfig(
                local_prefill_tokens=world.scenario.local_prefill_tokens,
                fetch_prefix_tokens=world.scenario.fetch_prefix_tokens,
                request_timeout_seconds=REQUEST_TIMEOUT,
                resume_timeout_seconds=_RESUME_TIMEOUT,
            ),
            figures,
            self.metrics,
            load_tokenizer=lambda source: cast(Any, SimTokenizer()),
            clock=world.clock,
        )
        asyncio.get_running_loop().create_task(self._start())
        self.booted = True

    async def _start(self) -> None:
        await self.directory.start()
        self.workers.start()
        self.relay.start()
        server = Server(self._world.network, self.node, address_of(self.spec.id), ErrorInterceptor())
        inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(self.relay), cast(Any, server))

    def drain(self, seconds: float) -> None:
        """What SIGTERM asks for."""
        asyncio.get_running_loop().create_task(self._drain(seconds))

    async def _drain(self, seconds: float) -> None:
        await self.relay.drain(seconds)
        self.relay.cut_off()
        await asyncio.sleep(_GOODBYE_SECONDS)
        self._world.faults.exits(self)
