"""All workers that this router knows: keeps a session to each that the directory lists, and the model they serve.

The sessions are the truth: a worker whose session stands is there, whatever Redis says or forgets. One that is not
listed any more and whose session is down is dropped. The first worker that connects fixes the model that is served;
one of another model is reported in the status and never used. Block size and dtype may differ from worker to worker.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from baton.clock import Clock
from baton.errors import HandoffFailed
from baton.ids import BlockHash, Incarnation, WorkerId
from baton.metrics import RouterMetrics
from baton.rpc import OpenChannel, open_channel
from baton.v1 import inference_pb2, worker_pb2
from discovery import WorkerRecord
from router.model import ModelInfo
from router.placement import Candidate, Role, State, WorkerKey
from router.session import Peer, SessionOptions, WorkerSession

_log = logging.getLogger(__name__)


class Directory(Protocol):
    """What the router needs of `discovery.Directory`. Hints: neither ever raises."""

    @property
    def connected(self) -> bool: ...

    def watch(self) -> AsyncIterator[list[WorkerRecord]]: ...

    async def longest_prefix(
        self, hashes: Sequence[BlockHash], workers: Sequence[tuple[WorkerId, Incarnation]]
    ) -> dict[WorkerId, int]: ...


class Workers:
    def __init__(
        self,
        directory: Directory,
        metrics: RouterMetrics,
        clock: Clock,
        options: SessionOptions | None = None,
        open_channel: OpenChannel = open_channel,
    ) -> None:
        self.directory = directory
        self.model: ModelInfo | None = None
        """What is served; None until a worker has said so."""
        self._metrics = metrics
        self._clock = clock
        self._options = options or SessionOptions()
        self._open_channel = open_channel
        self._sessions: dict[WorkerKey, WorkerSession] = {}
        self._models: dict[WorkerKey, ModelInfo] = {}
        """What each has said of itself, of those that were accepted."""
        self._listed: dict[WorkerId, WorkerKey] = {}
        self._changed = asyncio.Event()
        self._watching: asyncio.Task[None] | None = None
        self._closing: set[asyncio.Task[None]] = set()
        self._stopped = False

    def start(self) -> None:
        self._watching = asyncio.create_task(self._watch(), name="watch workers")

    async def stop(self) -> None:
        self._stopped = True
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await asyncio.gather(*(session.close() for session in self._sessions.values()), *self._closing)

    async def _watch(self) -> None:
        async for records in self.directory.watch():
            try:
                self._reconcile(records)
            except Exception:  # one record that cannot be taken in must not end discovery for all others
                _log.exception("the listed workers could not be taken in; those known stay")

    # --- what others see

    def session(self, key: WorkerKey) -> WorkerSession | None:
        return self._sessions.get(key)

    def sessions(self) -> list[WorkerSession]:
        return [self._sessions[key] for key in sorted(self._sessions)]

    def state(self, session: WorkerSession) -> State:
        if not session.standing:
            return State.UNREACHABLE
        superseded = self._listed.get(session.peer.key.id, session.peer.key) != session.peer.key
        return State.DRAINING if session.draining or superseded else State.READY

    def ready(self) -> list[WorkerKey]:
        return [key for key, session in self._sessions.items() if self.state(session) is State.READY]

    def ready_by_block_size(self) -> dict[int, list[WorkerKey]]:
        by_size: dict[int, list[WorkerKey]] = {}
        for key in self.ready():
            by_size.setdefault(self._models[key].layout.block_size, []).append(key)
        return by_size

    def candidates(self, cached_blocks: Mapping[WorkerId, int]) -> list[Candidate]:
        return [
            self._candidate(session, self._models[session.peer.key], cached_blocks)
            for session in self.sessions()
            if session.peer.key in self._models
        ]

    def max_prompt_len(self) -> int:
        """Most prompt tokens that any worker which decodes can hold; 0 where none is ready."""
        return max(
            (
                session.hello.model.max_prompt_len
                for session in self._sessions.values()
                if session.hello is not None and session.peer.role.decodes and self.state(session) is State.READY
            ),
            default=0,
        )

    def missing(self) -> str:
        """Empty when requests can be served; else which role is missing and how its workers are. Clients see it: where
        a worker is and what its connection says is for `status` and the log."""
        if any(self._sessions[key].peer.role.decodes for key in self.ready()):
            return ""
        known = [
            f"{session.peer.key.id} is {self.state(session).name.lower()}"
            for session in self.sessions()
            if session.peer.role.decodes
        ]
        wanted = "no decode or unified worker is ready; one must be running and registered in Redis"
        return f"{wanted} ({'; '.join(known)})" if known else wanted

    async def wait_change(self, seconds: float) -> None:
        """Returns when a worker came, went or changed its state, or after `seconds`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(max(seconds, 0)):
                await self._changed.wait()

    # --- sessions

    def _reconcile(self, records: Sequence[WorkerRecord]) -> None:
        self._listed = {record.id: WorkerKey(record.id, record.incarnation) for record in records}
        for record in records:
            key = self._listed[record.id]
            known = self._sessions.get(key)
            if known is not None and known.peer.address != record.address:
                self._drop(key)  # the same life at another address: it is the record that was corrected
            if key not in self._sessions:
                self._sessions[key] = self._connect(key, record)
        self._drop_departed()
        self._notify()

    def _connect(self, key: WorkerKey, record: WorkerRecord) -> WorkerSession:
        peer = Peer(key, Role[record.role.name], record.address, record.metrics, record.pid)
        return WorkerSession(
            peer,
            accept=self._accept,
            on_change=self._on_session_change,
            metrics=self._metrics,
            clock=self._clock,
            options=self._options,
            open_channel=self._open_channel,
        )

    def _on_session_change(self) -> None:
        if not self._stopped:
            self._drop_departed()
            self._notify()

    def _drop_departed(self) -> None:
        listed = set(self._listed.values())
        for key, session in list(self._sessions.items()):
            if key not in listed and not session.standing:
                self._drop(key)

    def _drop(self, key: WorkerKey) -> None:
        """Forgets it now, lets it close by itself: a session may be dropped from a call of its own."""
        session = self._sessions.pop(key)
        self._models.pop(key, None)
        task = asyncio.create_task(session.close(), name=f"close {key.id}")
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _accept(self, session: WorkerSession, hello: worker_pb2.Hello) -> str:
        try:
            model = ModelInfo.from_proto(hello.model)
        except HandoffFailed as error:
            return error.message
        flaw = model.flaw()
        if flaw:
            return flaw
        if self.model is None or (self.model.name == model.name and not self._others_stand(session)):
            self.model = model
        difference = self.model.difference(model)
        if difference:
            return f"serves something else: {difference}"
        self._models[session.peer.key] = model
        return ""

    def _others_stand(self, session: WorkerSession) -> bool:
        return any(other.standing for other in self._sessions.values() if other is not session)

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        counts = {(role, state): 0 for role in Role for state in State}
        for session in self._sessions.values():
            counts[session.peer.role, self.state(session)] += 1
        for (role, state), count in counts.items():
            self._metrics.workers.labels(role=role.name.lower(), state=state.name.lower()).set(count)

    def _candidate(self, session: WorkerSession, model: ModelInfo, cached_blocks: Mapping[WorkerId, int]) -> Candidate:
        load, recent = session.load, session.recent_tokens
        available = load.available_blocks if load.total_blocks else 2**31  # it has not said yet
        return Candidate(
            key=session.peer.key,
            role=session.peer.role,
            state=self.state(session),
            max_prompt_len=model.max_prompt_len,
            layout=model.layout,
            streams=max(load.running + load.waiting, len(session.attempts)),
            queued_tokens=load.queued_tokens + recent,
            available_blocks=max(available - recent // model.layout.block_size, 0),
            cached_blocks=cached_blocks.get(session.peer.key.id, 0),
        )

    def status(self) -> list[inference_pb2.WorkerStatus]:
        return [self._status(session) for session in self.sessions()]

    def _status(self, session: WorkerSession) -> inference_pb2.WorkerStatus:
        peer = session.peer
        return inference_pb2.WorkerStatus(
            id=peer.key.id,
            role=peer.role.value,  # type: ignore[arg-type]  # Role has the enum's numbers
            address=peer.address,
            metrics=peer.metrics,
            pid=peer.pid,
            state=self.state(session).value,  # type: ignore[arg-type]  # State has the enum's numbers
            load=session.load,
            detail=session.detail,
        )
