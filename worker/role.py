"""What a prefill and a decode worker differ in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from baton.ids import AttemptId
from baton.v1 import transfer_pb2, worker_pb2
from engine.messages import AddRequest, Command, EndReason, RequestEvent
from worker.wire import PrefixSource

SendCommand = Callable[[Command], None]


class Role(Protocol):
    """Called on the event loop. `WorkerCore` sees to sessions, deadlines and terminal replies; a role sees to blocks
    that another worker reads or writes."""

    @property
    def tasks(self) -> frozenset[worker_pb2.Task.ValueType]:
        """What it can be asked to do."""

    def submit(self, task: worker_pb2.Task.ValueType, request: AddRequest, prefix: PrefixSource | None = None) -> None:
        """`prefix`: where the prompt's beginning can be had, for a task that computes it."""

    def handoff(self, request_id: AttemptId, ticket: transfer_pb2.Ticket) -> None:
        """A ticket has come for a request that was submitted. Raises BatonError where it is of no use for it."""

    def cancel(self, request_id: AttemptId, reason: EndReason, message: str) -> None:
        """Ends everything that the attempt holds or waits for, as soon as nobody reads or writes it any more. An Ended
        follows if none has come yet. Unknown attempts are no error."""

    def move(self, request_id: AttemptId) -> None:
        """The attempt is to end here, with its blocks offered to whoever goes on with it."""

    def on_event(self, event: RequestEvent) -> None:
        """Each of the engine's request events, before the router hears of it."""

    def holds(self, request_id: AttemptId) -> bool:
        """Whether blocks are kept for the attempt although it has ended."""

    async def drain(self, seconds: float) -> None:
        """Lends no more, and waits until nobody reads what this worker has offered."""
