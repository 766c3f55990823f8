"""Bugs of the side that pulls."""

from __future__ import annotations

from typing import Any

from baton.errors import BatonError, HandoffFailed
from baton.v1 import transfer_pb2, worker_pb2
from decode_worker.admission import Admission, _Arrival
from engine.messages import AddRequest, EndReason, RequestEvent, Reserved
from kvtransfer.landing import Landing
from kvtransfer.lifetimes import DestinationState
from kvtransfer.ticket import Ticket
from sim.planted.plant import Plant
from worker.wire import PrefixSource


def _fail_and_free(self: Landing, error: BatonError) -> bool:
    if not isinstance(error, HandoffFailed) or self._done.done() or self.gate.closed:
        return _fail(self, error)
    self.gate.close(lambda: None)  # whoever is inside goes on writing
    self._lifetime.to(DestinationState.FREE)
    self._drained.set()
    self._done.set_exception(error)
    self._done.exception()
    return True


_fail = Landing.fail


def _wait_for_the_ticket(self: Admission, request_id: Any, reason: EndReason, message: str) -> None:
    arrival = self._arrivals.get(request_id)
    if arrival is not None and arrival.ticket is None:
        return  # the notice that would tell of its end goes to the one who comes with the ticket
    _cancel(self, request_id, reason, message)


_cancel = Admission.cancel


def _submit_and_reserve(
    self: Admission, task: worker_pb2.Task.ValueType, request: AddRequest, prefix: PrefixSource | None = None
) -> None:
    _submit(self, task, request, prefix)
    if task != worker_pb2.TASK_LOCAL:
        self._send(request)


_submit = Admission.submit


def _handoff_to_reserved(self: Admission, request_id: Any, ticket: transfer_pb2.Ticket) -> None:
    arrival = self._arrivals.get(request_id)
    if arrival is None or arrival.ticket is not None:
        return
    arrival.ticket = Ticket.from_proto(ticket)
    arrival.keeper = self._spawn(self._keep(request_id, arrival.ticket))
    early = _early(self).pop(request_id, None)
    if early is not None:
        _on_event(self, early)


def _early(self: Admission) -> dict[Any, Reserved]:
    """Reservations that came before their ticket."""
    early: dict[Any, Reserved] = vars(self).setdefault("early", {})
    return early


def _hold_what_is_reserved(self: Admission, event: RequestEvent) -> None:
    arrival: _Arrival | None = self._arrivals.get(event.id)
    if isinstance(event, Reserved) and arrival is not None:
        if arrival.ticket is None:
            _early(self)[event.id] = event
            return
        if arrival.ticket is _NO_TICKET:
            arrival.reserved = True  # given up meanwhile, and freed when it has ended
            return
    _on_event(self, event)


_on_event = Admission.on_event


def _cancel_reserved(self: Admission, request_id: Any, reason: EndReason, message: str) -> None:
    arrival = self._arrivals.get(request_id)
    if arrival is not None and arrival.ticket is None:
        early = _early(self).pop(request_id, None)
        arrival.reserved = early is not None
        arrival.ticket = _NO_TICKET
    _cancel(self, request_id, reason, message)


_NO_TICKET: Any = object()

PLANTS = (
    Plant(
        "freed-under-writer",
        "sglang#24527, sglang#38961",
        "an aborted landing's blocks are free at once, although a writer may still reach them",
        ((Landing, "in_flight", property(lambda self: False)),),
    ),
    Plant(
        "sibling-frees",
        "vllm#56104",
        "the first fetch that fails frees the blocks that its siblings still write",
        ((Landing, "fail", _fail_and_free),),
    ),
    Plant(
        "notice-never-comes",
        "vllm#46283",
        "a request that is aborted before its ticket has come waits for the ticket",
        ((Admission, "cancel", _wait_for_the_ticket),),
    ),
    Plant(
        "hold-and-wait",
        "sglang#31473",
        "blocks are reserved before there is an offer: each side holds what the other waits for",
        (
            (Admission, "submit", _submit_and_reserve),
            (Admission, "handoff", _handoff_to_reserved),
            (Admission, "on_event", _hold_what_is_reserved),
            (Admission, "cancel", _cancel_reserved),
        ),
    ),
)
