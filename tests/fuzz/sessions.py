"""A worker's session with a router that says anything: real core, role, scheduler and pool, a scripted model."""

from __future__ import annotations

from baton.sampling import SamplingParams
from baton.v1 import worker_pb2
from decode_worker.admission import Admission
from prefill_worker.handoff import Handoff
from tests.fuzz.doors import read, unless
from tests.fuzz.mutator import Mutator
from tests.worker.rig import make_rig, proto_id, ticket_for
from worker.session import Session

PROMPT = [n % 50 for n in range(3, 25)]
_ATTEMPTS = 4
_TURN = 0.05
_BREAK = 0.002


class SessionDoor:
    def __init__(self, role: str, kind: type[Handoff] | type[Admission]) -> None:
        self.name = f"sessions, {role}"
        self._rig = make_rig(kind)
        self._rig.puller.answered.set()

    async def knock(self, mutator: Mutator) -> None:
        """What the real service would log as a defect, and end the session by, is raised here."""
        rng, rig = mutator.rng, self._rig
        attempt = rng.randrange(_ATTEMPTS)
        wire = mutator.wire(rng.choice((_submit, _submit, _handoff, _cancel, _move))(attempt, rng.choice(list(_TASKS))))
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
    return SessionDoor("decode", Admission)


def prefill_door() -> SessionDoor:
    return SessionDoor("prefill", Handoff)


_HOLDER = worker_pb2.PrefixSource(worker_id="h", address="127.0.0.1:2", incarnation=9, num_blocks=5)
_TASKS = (worker_pb2.TASK_PREFILL, worker_pb2.TASK_RECEIVE, worker_pb2.TASK_LOCAL)


def _submit(attempt: int, task: worker_pb2.Task.ValueType) -> worker_pb2.SessionRequest:
    sampling = SamplingParams(max_tokens=5, seed=0, ignore_eos=True)
    return worker_pb2.SessionRequest(submit=worker_pb2.Submit(
        id=proto_id(attempt), task=task, token_ids=PROMPT, num_prompt_tokens=len(PROMPT), sampling=sampling.to_proto(),
        cache_salt=b"tenant", deadline_seconds=60.0, prefix=_HOLDER if attempt % 2 else None,
    ))  # fmt: skip


def _handoff(attempt: int, _: object) -> worker_pb2.SessionRequest:
    return worker_pb2.SessionRequest(
        handoff=worker_pb2.Handoff(id=proto_id(attempt), ticket=ticket_for(PROMPT, attempt))
    )


def _cancel(attempt: int, _: object) -> worker_pb2.SessionRequest:
    return worker_pb2.SessionRequest(cancel=worker_pb2.Cancel(id=proto_id(attempt)))


def _move(attempt: int, _: object) -> worker_pb2.SessionRequest:
    return worker_pb2.SessionRequest(move=worker_pb2.Move(id=proto_id(attempt)))
