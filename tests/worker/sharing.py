"""A prompt, who holds its beginning, and the moments of fetching it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from baton.hashing import block_hashes, root_hash
from baton.ids import AttemptId
from baton.v1 import worker_pb2
from decode_worker.admission import Admission
from prefill_worker.handoff import Handoff
from tests.worker.rig import BLOCK, FINGERPRINT, Rig

PROMPT = [n % 50 for n in range(3, 25)]
NAMES = block_hashes(root_hash(FINGERPRINT), PROMPT, BLOCK)
HOLDER = worker_pb2.PrefixSource(worker_id="h", address="127.0.0.1:2", incarnation=9, num_blocks=5)
LOCAL, PREFILL = worker_pb2.TASK_LOCAL, worker_pb2.TASK_PREFILL
TASKS = {Admission: LOCAL, Handoff: PREFILL}
Moment = Callable[[Rig], Awaitable[None]]


def submit(rig: Rig, prefix: worker_pb2.PrefixSource = HOLDER) -> AttemptId:
    return rig.submit(rig.task, PROMPT, prefix=prefix)  # type: ignore[attr-defined]


def land(rig: Rig) -> None:
    rig.puller.commit(PROMPT[: rig.puller.lends * BLOCK])


async def let_go(rig: Rig) -> None:
    """What a prefill has offered is pulled."""
    for attempt in rig.ledger.live():
        rig.ledger.abort(attempt)
    await rig.settle()


async def submitted(rig: Rig) -> None:
    submit(rig)


async def asking(rig: Rig) -> None:
    """Blocks are reserved, and the lender has not answered."""
    submit(rig)
    await rig.turn()
    assert rig.puller.asked == [NAMES]
    assert rig.pool.counts().landing == 5


async def landing(rig: Rig) -> None:
    await asking(rig)
    rig.puller.lends = 4
    rig.puller.answered.set()
    await rig.turn()
    rig.puller.landings[-1].land()


async def writing(rig: Rig) -> None:
    await landing(rig)
    assert rig.puller.landings[-1].gate.enter()


async def landed(rig: Rig) -> None:
    """Committed by the landing; neither worker nor engine know yet."""
    await landing(rig)
    land(rig)


MOMENTS: list[Moment] = [submitted, asking, landing, writing, landed]


async def cached(rig: Rig) -> None:
    rig.submit(rig.task, PROMPT, attempt=7)  # type: ignore[attr-defined]
    await rig.settle()
    await let_go(rig)
