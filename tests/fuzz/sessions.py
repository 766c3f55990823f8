"""A worker's session with a router that says anything: real core, role, scheduler and pool, a scripted model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from baton.clock import ManualClock
from baton.ids import Incarnation, WorkerId
from baton.layout import KVLayout
from baton.metrics import Metrics, TransferMetrics
from baton.sampling import SamplingParams
from baton.v1 import worker_pb2
from decode_worker.admission import Admission
from kvtransfer.gate import ReadPermits
from kvtransfer.memory import HostMemory
from kvtransfer.source import SourceLedger
from prefill_worker.handoff import Handoff
from tests.fuzz.doors import read, unless
from tests.fuzz.mutator import Mutator
from tests.worker.rig import Rig, ScriptedPuller, proto_id, ticket_for
from worker.core import WorkerCore
from worker.role import Role, SendCommand
from worker.session import Session

PROMPT = [n % 50 for n in range(3, 25)]
_ATTEMPTS = 4
_TURN = 0.05
_BREAK = 0.002


class SessionDoor:
    def __init__(self, role: str, make_role: Callable[[WorkerCore, SendCommand, Rig], Role]) -> None:
        self.name = f"sessions, {role}"
        self._make_role = make_role
        self._rig = Rig(make_role)

    async def knock(self, mutator: Mutator) -> None:
        """What the real service would log as a defect, and end the session by, is raised here."""
        rng, rig = mutator.rng, self._rig
        attempt = rng.randrange(_ATTEMPTS)
        wire = mutator.wire(rng.choice((_submit, _submit, _handoff, _cancel))(attempt, rng.choice(list(_TASKS))))
        rig.core.receive(rig.session, read(worker_pb2.SessionRequest, wire))
        if rng.random() < _TURN:
            await rig.turn()
            rig.told.clear()
        if rng.random() < _BREAK:
            await self.rest()

    async def rest(self) -> None:
        """The router is gone, and with it all that it wanted. Another's request is served."""
        rig = self._rig
        rig.core.close_session(rig.session)
        await rig.settle()
        rig.assert_idle()
        rig.session = Session()
        rig.core.open_session(rig.session)
        rig.told.clear()
        task = worker_pb2.TASK_PREFILL if worker_pb2.TASK_PREFILL in rig.core._role.tasks else worker_pb2.TASK_LOCAL
        rig.submit(task, PROMPT)
        await rig.turn(20)
        unless(bool(rig.tokens()), "an honest request is not served")
        rig.core.close_session(rig.session)
        await rig.settle()
        rig.assert_idle()
        rig.session = Session()
        rig.core.open_session(rig.session)
        rig.told.clear()


def decode_door() -> SessionDoor:
    return SessionDoor("decode", lambda core, send, rig: Admission(core, ScriptedPuller(rig), send))  # type: ignore[arg-type]


def prefill_door(executor: ThreadPoolExecutor) -> SessionDoor:
    def make_role(core: WorkerCore, send: SendCommand, rig: Rig) -> Role:
        ledger = SourceLedger(
            memory=HostMemory.create(32, 64),
            layout=KVLayout(1, 1, 4, 4, "float32", b"model"),
            worker_id=WorkerId("p"),
            address="127.0.0.1:1",
            incarnation=Incarnation(7),
            lease_seconds=10.0,
            on_terminal=lambda request_id: role.set_over(request_id),
            clock=ManualClock(),
            metrics=TransferMetrics(Metrics()),
            executor=executor,
            permits=ReadPermits(),
        )
        role = Handoff(core, ledger, send)
        return role

    return SessionDoor("prefill", make_role)


_TASKS = (worker_pb2.TASK_PREFILL, worker_pb2.TASK_RECEIVE, worker_pb2.TASK_LOCAL)


def _submit(attempt: int, task: worker_pb2.Task.ValueType) -> worker_pb2.SessionRequest:
    sampling = SamplingParams(max_tokens=5, seed=0, ignore_eos=True)
    return worker_pb2.SessionRequest(submit=worker_pb2.Submit(
        id=proto_id(attempt), task=task, token_ids=PROMPT, num_prompt_tokens=len(PROMPT), sampling=sampling.to_proto(),
        cache_salt=b"tenant", deadline_seconds=60.0,
    ))  # fmt: skip


def _handoff(attempt: int, _: object) -> worker_pb2.SessionRequest:
    return worker_pb2.SessionRequest(
        handoff=worker_pb2.Handoff(id=proto_id(attempt), ticket=ticket_for(PROMPT, attempt))
    )


def _cancel(attempt: int, _: object) -> worker_pb2.SessionRequest:
    return worker_pb2.SessionRequest(cancel=worker_pb2.Cancel(id=proto_id(attempt)))
