"""A worker without sockets: real core, role, scheduler and landings; a scripted model, a puller that does as told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast

from baton.clock import Clock, ManualClock
from baton.errors import HandoffFailed
from baton.hashing import block_hashes, root_hash
from baton.ids import AttemptId, BlockHash, BlockIndex, BlockRef, Generation, Incarnation, TransferId, WorkerId
from baton.layout import KVLayout
from baton.metrics import Metrics, RequestMetrics, TransferMetrics, WorkerMetrics
from baton.sampling import SamplingParams
from baton.v1 import inference_pb2, transfer_pb2, worker_pb2
from decode_worker.admission import Admission
from engine.block_pool import BlockPool
from engine.engine import Engine
from engine.limits import SchedulerLimits
from engine.messages import Command
from engine.scheduler import Scheduler
from kvtransfer.checksum import ChecksumKind
from kvtransfer.gate import ReadPermits
from kvtransfer.landing import Landed, Landing
from kvtransfer.memory import HostMemory
from kvtransfer.reservation import Prompt
from kvtransfer.source import SourceLedger
from kvtransfer.ticket import Ticket
from prefill_worker.handoff import Handoff
from tests.engine.scripted_runner import VOCAB, ScriptedRunner, next_token
from worker.core import WorkerCore
from worker.fetching import Fetching
from worker.lending import Lending
from worker.role import Role, SendCommand
from worker.session import Session

BLOCK = 4
FINGERPRINT = b"model"
LEASE = 10.0
LAYOUT = KVLayout(1, 1, BLOCK, 1, "float32", FINGERPRINT)
_EXECUTOR = ThreadPoolExecutor(1)


class Rig:
    """Steps are taken by hand: `turn` does what the engine's thread does between two sleeps."""

    clock: ManualClock
    ledger: SourceLedger
    puller: ScriptedPuller
    lending: Lending

    def __init__(self, make_role: Callable[[WorkerCore, SendCommand, Rig], Role], blocks: int = 32) -> None:
        self.runner = ScriptedRunner(BLOCK)
        self.pool = BlockPool(blocks, on_take=self.runner.on_take)
        limits = SchedulerLimits(BLOCK, 4, 16, 64, frozenset(), FINGERPRINT)
        self.engine = Engine(Scheduler(self.pool, limits), self.runner)
        self.commands: list[Command] = []
        self.metrics = Metrics()
        self.core = WorkerCore(
            lambda core: make_role(core, self.commands.append, self),
            vocab_size=VOCAB,
            block_events=None,
            request_metrics=RequestMetrics(self.metrics, "m"),
            metrics=WorkerMetrics(self.metrics),
        )
        self.session = Session()
        self.core.open_session(self.session)
        self.told: list[worker_pb2.RequestEvent] = []
        self.load = inference_pb2.Load()

    async def turn(self, steps: int = 1) -> None:
        """Commands in, a step, events out, and whatever the event loop then has to do."""
        for _ in range(steps):
            commands, self.commands[:] = list(self.commands), []
            for command in commands:
                self.engine.handle(command)
            self.engine.step()
            self.core.on_engine_events(self.engine.drain_events(), self.engine.load())
            for _ in range(5):
                await asyncio.sleep(0)
            self._listen()

    def compute_unheard(self, steps: int) -> Callable[[], None]:
        """The engine's thread is ahead: what it has to say is under way, and arrives when the result is called."""
        commands, self.commands[:] = list(self.commands), []
        for command in commands:
            self.engine.handle(command)
        for _ in range(steps):
            self.engine.step()
        events, load = self.engine.drain_events(), self.engine.load()
        return lambda: self.core.on_engine_events(events, load)

    async def settle(self) -> None:
        await self.turn(60)
        assert not self.commands

    def _listen(self) -> None:
        step = self.session.take()
        if step is not None:
            self.load = step.load
            self.told += step.events

    def say(self, **message: object) -> None:
        self.core.receive(self.session, worker_pb2.SessionRequest(**message))
        self._listen()

    def submit(
        self,
        task: int,
        prompt: Sequence[int],
        attempt: int = 0,
        deadline: float = 0,
        count: int = 5,
        prefix: worker_pb2.PrefixSource | None = None,
    ) -> AttemptId:
        sampling = SamplingParams(max_tokens=count, seed=0, ignore_eos=True)
        message = worker_pb2.Submit(
            id=proto_id(attempt),
            task=task,  # type: ignore[arg-type]  # tests also send tasks that there are not
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            sampling=sampling.to_proto(),
            deadline_seconds=deadline,
            prefix=prefix,
        )
        self.say(submit=message)
        return AttemptId("r", attempt)

    def pass_deadlines(self) -> None:
        """As if all the time had passed that open attempts have."""
        for attempt in list(self.core._attempts.values()):
            assert attempt.deadline is not None
            attempt.deadline._run()

    def events(self, kind: str) -> list[worker_pb2.RequestEvent]:
        return [event for event in self.told if event.WhichOneof("event") == kind]

    def tokens(self) -> list[int]:
        got: list[int] = []
        for event in self.events("tokens"):
            assert event.tokens.index == len(got)
            got += event.tokens.token_ids
        return got

    def end(self) -> int:
        """The reason of the one terminal reply."""
        ended = self.events("ended")
        assert len(ended) == 1, f"{len(ended)} terminal replies"
        return ended[0].ended.reason

    def assert_idle(self) -> None:
        counts = self.pool.counts()
        assert counts.total == self.pool.num_blocks
        assert counts.active == counts.offered == counts.landing == counts.quarantined == 0, counts
        assert not self.core.open_attempts, "an attempt is remembered for ever"


def proto_id(attempt: int = 0) -> worker_pb2.AttemptId:
    return worker_pb2.AttemptId(request_id="r", attempt=attempt)


@dataclass
class ScriptedPuller:
    """Lands what it is told to, when it is told to."""

    rig: Rig
    landings: list[Landing] = field(default_factory=list)
    reserved: list[Sequence[BlockRef]] = field(default_factory=list)
    kept: list[Ticket] = field(default_factory=list)
    offer_over: asyncio.Event = field(default_factory=asyncio.Event)
    asked: list[list[BlockHash]] = field(default_factory=list)
    """Of a lender, by name."""
    answered: asyncio.Event = field(default_factory=asyncio.Event)
    released: list[Ticket] = field(default_factory=list)
    """Unread."""
    lends: int = 0
    """So many blocks the lender has, when it answers."""
    own_dtype: bool = True
    """Of what lands."""

    def land(
        self,
        ticket: Ticket,
        id: AttemptId,
        destination: Sequence[BlockRef],
        first_missing: int,
        prompt: Prompt | None = None,
    ) -> Landing:
        landing = Landing(id, lambda old, new: None)
        self.landings.append(landing)
        self.reserved.append(destination[first_missing:])
        return landing

    async def borrow(
        self, lender: WorkerId, address: str, incarnation: int, id: AttemptId, hashes: Sequence[BlockHash]
    ) -> Ticket:
        self.asked.append(list(hashes))
        await self.answered.wait()
        if not self.lends:
            raise HandoffFailed("nothing is lent")
        return Ticket.from_proto(ticket_of(hashes[: self.lends], id))

    async def pull(self, ticket: Ticket, id: AttemptId, destination: Sequence[BlockRef], first_missing: int) -> None:
        assert first_missing == len(destination) == len(ticket.blocks), "only to release what was lent"
        self.released.append(ticket)

    async def keep(self, ticket: Ticket) -> None:
        self.kept.append(ticket)
        await self.offer_over.wait()
        raise HandoffFailed("the offer is over")

    def commit(self, prompt: Sequence[int], first_token: int | None = None) -> None:
        """The blocks have landed and are verified."""
        landing, blocks = self.landings[-1], self.reserved[-1]
        missing = -(-len(prompt) // BLOCK) - len(blocks)
        for position in range(missing * BLOCK, len(prompt)):
            block = blocks[position // BLOCK - missing]
            self.rig.runner.kv[block.index][position % BLOCK] = prompt[position]
        if landing.state.value == "reserved":
            landing.land()
        assert landing.verify()
        token = next_token(list(prompt)) if first_token is None else first_token
        landing.commit(Landed(token, len(blocks), 64 * len(blocks), 0.001, "shm", own_dtype=self.own_dtype))


def make_rig(kind: type[Handoff] | type[Admission], blocks: int = 32) -> Rig:
    """A worker of that role, with a real ledger (`rig.ledger`, by `rig.clock`) and a scripted puller (`rig.puller`)."""

    def make_role(core: WorkerCore, send: SendCommand, rig: Rig) -> Role:
        rig.clock = ManualClock()
        rig.ledger = ledger = _ledger(rig.clock, blocks, lambda request_id: role.set_over(request_id))
        rig.puller = ScriptedPuller(rig)
        rig.lending = Lending(ledger, send)
        fetching = Fetching(core, cast(Any, rig.puller), send, WorkerMetrics(Metrics()))
        role: Handoff | Admission
        if kind is Handoff:
            role = Handoff(core, ledger, rig.lending, fetching, send)
        else:
            role = Admission(core, cast(Any, rig.puller), rig.lending, fetching, send)
        return role

    return Rig(make_role, blocks)


def _ledger(clock: Clock, blocks: int, on_terminal: Callable[[AttemptId], None]) -> SourceLedger:
    return SourceLedger(
        memory=HostMemory.create(blocks, LAYOUT.block_bytes),
        layout=LAYOUT,
        worker_id=WorkerId("p"),
        address="127.0.0.1:1",
        incarnation=Incarnation(7),
        lease_seconds=LEASE,
        on_terminal=on_terminal,
        clock=clock,
        metrics=TransferMetrics(Metrics()),
        executor=_EXECUTOR,
        permits=ReadPermits(),
    )


def ticket_for(prompt: Sequence[int], attempt: int = 0) -> transfer_pb2.Ticket:
    hashes = block_hashes(root_hash(FINGERPRINT), prompt, BLOCK, partial=True)
    return ticket_of(hashes, AttemptId("r", attempt), len(prompt))


def ticket_of(hashes: Sequence[BlockHash], id: AttemptId, num_tokens: int = 0) -> transfer_pb2.Ticket:
    return Ticket(
        transfer_id=TransferId(bytes(range(16))),
        worker_id=WorkerId("p"),
        address="127.0.0.1:1",
        incarnation=Incarnation(7),
        layout=LAYOUT,
        blocks=tuple(BlockRef(BlockIndex(i), Generation(1), h) for i, h in enumerate(hashes)),
        lease_seconds=10,
        num_tokens=num_tokens or len(hashes) * BLOCK,
        id=id,
        checksum_kind=ChecksumKind.XXH3,
    ).to_proto()
