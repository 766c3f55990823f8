"""One life of one worker's process: production's core, role, scheduler, pool, ledger or puller, wired as in
worker/server.py and in either role's server.py, with the simulator's memory, model and network."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from random import Random
from typing import TYPE_CHECKING, Any, cast

from baton.ids import AttemptId, BlockIndex, WorkerId, new_incarnation
from baton.layout import KVLayout
from baton.metrics import RequestMetrics, TransferMetrics, WorkerMetrics
from baton.v1 import transfer_pb2_grpc, worker_pb2, worker_pb2_grpc
from decode_worker.admission import Admission
from discovery.records import WorkerRecord, WorkerRole
from discovery.registration import Registration
from engine.block_pool import BlockPool, Hold
from engine.engine import Engine
from engine.limits import SchedulerLimits
from engine.plan import StepPlan, StepResult
from engine.scheduler import Scheduler
from engine.swap import SwapPool
from kvtransfer.destination import Puller
from kvtransfer.gate import ReadPermits
from kvtransfer.service import TransferService
from kvtransfer.source import SourceLedger
from kvtransfer.threads import Threads
from kvtransfer.transports.chooser import Connector
from kvtransfer.transports.fake import FakeSource
from prefill_worker.handoff import Handoff
from sim import invariants, model
from sim.engine_driver import EngineDriver
from sim.figures import Figures
from sim.loop import Node
from sim.memory import SimMemory
from sim.network import Server
from sim.pacer import pacer_of
from sim.redis import HEARTBEAT_SECONDS, SimRedisClient
from sim.runner import SimRunner
from sim.scenario import WorkerSpec
from worker.core import WorkerCore
from worker.fetching import Fetching
from worker.lending import Lending
from worker.role import Role, SendCommand
from worker.session import WorkerService

if TYPE_CHECKING:
    from sim.world import World

MODEL = b"m" * 16
_QUIET_SECONDS = 0.05
_GOODBYE_SECONDS = 1.0
"""Streams stay open for so long behind a drain, as worker/server.py has it."""
_ROLES = {WorkerRole.PREFILL: 1, WorkerRole.DECODE: 2, WorkerRole.UNIFIED: 3}


class _Nowhere(Executor):
    """The loop runs what is handed to an executor by itself; none is ever used."""


class Life:
    """Starts in its own node's context."""

    def __init__(self, world: World, spec: WorkerSpec, number: int) -> None:
        self.spec = spec
        self.number = number
        self.node = Node(spec.id, number, spec.clock_rate)
        self.address = f"{spec.id}:1"
        self.booted = False
        self.draining = False
        self.ledger: SourceLedger | None = None
        self.puller: Puller | None = None
        self.source: FakeSource | None = None
        self._world = world
        self._draw = Random(f"life {world.scenario.seed} {spec.id} {number}")
        world.loop.call_soon(self._boot, context=self.node.context)

    def _boot(self) -> None:
        world, spec = self._world, self.spec
        scenario = world.scenario
        figures = Figures()
        self.transfers, self.worker_metrics = TransferMetrics(figures), WorkerMetrics(figures)
        self.layout = KVLayout(1, 1, spec.block_size, 2, "float32", MODEL)
        self.memory = SimMemory(spec.num_blocks, self.layout, self._guard)
        self.pool = BlockPool(spec.num_blocks, generations=self.memory.generations, on_take=self.memory.on_take)
        limits = SchedulerLimits(
            block_size=spec.block_size,
            max_num_seqs=spec.max_num_seqs,
            max_num_batched_tokens=spec.max_num_batched_tokens,
            max_model_len=scenario.max_model_len,
            eos_token_ids=frozenset(model.EOS),
            model_fingerprint=MODEL,
        )
        self.swap = SwapPool(spec.num_swap_slots)
        self.runner = SimRunner(self.memory, self.pool, spec.block_size, self._broken)
        self.engine = Engine(
            Scheduler(self.pool, limits, self.swap),
            self.runner,
            pacer=pacer_of(spec.steps, spec.itl_objective_seconds),
        )
        self.driver = EngineDriver(
            world.loop,
            self.engine,
            spec.steps,
            self._draw,
            lambda events, load: self.core.on_engine_events(events, load),
            self._stepped,
            self._touched,
        )
        self.record = WorkerRecord(
            id=WorkerId(spec.id),
            incarnation=new_incarnation(),
            role=spec.role,
            address=self.address,
            metrics="",
            pid=1,
            model="sim",
            block_size=spec.block_size,
            model_fingerprint=MODEL,
        )
        server = Server(world.network, self.node, self.address)
        self.registration = Registration(
            cast(Any, SimRedisClient(world.redis, spec.id)),
            self.record,
            heartbeat_seconds=HEARTBEAT_SECONDS,
            clock=world.clock,
        )
        self.core = WorkerCore(
            lambda core: self._role(core, self.driver.send, server),
            vocab_size=model.VOCAB,
            block_events=self.registration,
            request_metrics=RequestMetrics(figures, "sim"),
            metrics=self.worker_metrics,
            clock=world.clock,
        )
        worker_pb2_grpc.add_WorkerServicer_to_server(WorkerService(self.core, self._hello()), cast(Any, server))
        self.driver.start()
        asyncio.get_running_loop().create_task(self.registration.start())
        self.booted = True

    def _role(self, core: WorkerCore, send: SendCommand, server: Server) -> Role:
        threads = Threads(cast(Any, _Nowhere()), cast(Any, _Nowhere()))
        world, transfers = self._world, self.transfers
        self.puller = puller = Puller(
            memory=self.memory,
            layout=self.layout,
            worker_id=self.record.id,
            connector=Connector(self.memory, threads, setting="fake", network=world.transport),
            threads=threads,
            clock=world.clock,
            metrics=transfers,
            open_channel=world.network.open_channel,
        )
        permits = ReadPermits()
        self.ledger = ledger = SourceLedger(
            memory=self.memory,
            layout=self.layout,
            worker_id=self.record.id,
            address=self.address,
            incarnation=self.record.incarnation,
            lease_seconds=world.scenario.lease_seconds,
            on_terminal=lambda request_id: role.set_over(request_id),
            clock=world.clock,
            metrics=transfers,
            executor=threads.memory,
            permits=permits,
        )
        lending, fetching = Lending(ledger, send), Fetching(core, puller, send, self.worker_metrics)
        role: Handoff | Admission
        if self.spec.role is WorkerRole.PREFILL:
            role = Handoff(core, ledger, lending, fetching, send)
        else:
            role = Admission(core, puller, lending, fetching, send)
        self.source = world.transport.add(self.spec.id, self.memory, permits)
        endpoint = self.source.endpoint()
        service = TransferService(ledger, lambda: [endpoint], transfers, lending.lend)
        transfer_pb2_grpc.add_TransferServicer_to_server(service, cast(Any, server))
        for work in (ledger.run_reaper(), puller.sweep()):
            asyncio.get_running_loop().create_task(work)
        return role

    def _hello(self) -> worker_pb2.Hello:
        scenario = self._world.scenario
        return worker_pb2.Hello(
            worker_id=self.record.id,
            incarnation=self.record.incarnation,
            role=cast(Any, _ROLES[self.spec.role]),
            model=worker_pb2.ModelInfo(
                name="sim",
                max_model_len=scenario.max_model_len,
                block_size=self.spec.block_size,
                vocab_size=model.VOCAB,
                max_prompt_len=scenario.max_model_len - 1,
                model_fingerprint=MODEL,
                layout_fingerprint=self.layout.fingerprint,
                source="sim",
                eos_token_ids=model.EOS,
                layout=self.layout.to_proto(),
            ),
            pid=1,
        )

    def holds(self, request: str) -> list[AttemptId]:
        """Attempts at it that are open, or whose blocks are."""
        return [id for id in self.core.open_attempts if id.request_id.partition("~")[0] == request]

    def overdue(self, request: str, seconds: float) -> list[AttemptId]:
        """Those of them that came more than so long ago, and have not ended."""
        attempts, now = self.core._attempts, self.node.local(self._world.loop.now)
        return [id for id in self.holds(request) if not attempts[id].ended and attempts[id].arrived + seconds < now]

    def drain(self, seconds: float) -> None:
        """What SIGTERM asks for."""
        asyncio.get_running_loop().create_task(self._drain(seconds))

    async def _drain(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        await self.registration.stop()
        await self.core.drain(seconds)
        if loop.time() < started + seconds:
            await asyncio.sleep(_QUIET_SECONDS + 4 * self.spec.steps.hop)  # what is on its way between its threads
            for what in invariants.at_exit(self):
                self._world.broken(what)
        await asyncio.sleep(_GOODBYE_SECONDS)
        self._world.faults.exits(self)

    def _touched(self) -> None:
        for what in invariants.after_every_event(self):
            self._world.broken(what)

    def _stepped(self, plan: StepPlan, result: StepResult) -> None:
        self._world.trace.count(f"step {self.node.name} {plan.num_tokens} {result.token_ids}".encode())

    def _guard(self, block: int) -> None:
        """Invariant: what a writer can still reach is nobody else's."""
        hold = self.pool._state(BlockIndex(block))
        if hold not in (Hold.LANDING, Hold.QUARANTINED):
            name = "nobody's" if hold is None else hold.name
            self._broken(f"a transfer writes block {block}, which is {name} by now")

    def _broken(self, what: str) -> None:
        self._world.broken(f"{self.node.name}: {what}")
