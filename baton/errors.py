"""Every error of Baton, and the one table that says what a client sees of it.

BatonError
├── InvalidRequest          the request itself is wrong, and will be wrong everywhere
│   ├── MessageTooLarge
│   └── PromptTooLong       for the model, or for every worker's memory
├── ModelNotFound
├── Overloaded              refused now, welcome later
├── DeadlineExceeded
├── RequestCancelled
├── Unavailable             nobody can serve it at present; another try may do better
│   ├── HandoffFailed       blocks could not be brought over
│   │   ├── LayoutMismatch
│   │   ├── LeaseExpired
│   │   ├── PeerLost
│   │   ├── TransferRefused
│   │   └── VerifyFailed    what arrived is not what was sent
│   └── WorkerLost
├── ConfigError             a process cannot start as it was asked to
│   ├── CheckpointError
│   ├── PortInUse
│   └── RedisUnreachable
└── InternalError           a defect of Baton's

A message says what was wrong, with its value, and what would be right.
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class BatonError(Exception):
    """Base of all. `grpc_status` and `http_status` are what a client gets; `kind` is OpenAI's error type."""

    grpc_status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        """The field of the request that is wrong, where one is."""


class InvalidRequest(BatonError):
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400
    kind = "invalid_request_error"


class MessageTooLarge(InvalidRequest):
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 413


class PromptTooLong(InvalidRequest):
    grpc_status = grpc.StatusCode.OUT_OF_RANGE


class ModelNotFound(BatonError):
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404
    kind = "invalid_request_error"


class Overloaded(BatonError):
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429
    kind = "rate_limit_error"


class DeadlineExceeded(BatonError):
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504
    kind = "timeout_error"


class RequestCancelled(BatonError):
    grpc_status = grpc.StatusCode.CANCELLED
    http_status = 499
    kind = "cancelled"


class Unavailable(BatonError):
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    kind = "service_unavailable"


class HandoffFailed(Unavailable):
    """Blocks could not be brought over; the request can be tried again without them."""


class LayoutMismatch(HandoffFailed):
    pass


class LeaseExpired(HandoffFailed):
    pass


class PeerLost(HandoffFailed):
    pass


class TransferRefused(HandoffFailed):
    pass


class VerifyFailed(HandoffFailed):
    pass


class WorkerLost(Unavailable):
    pass


class ConfigError(BatonError):
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class CheckpointError(ConfigError):
    pass


class PortInUse(ConfigError):
    pass


class RedisUnreachable(ConfigError):
    pass


class InternalError(BatonError):
    pass
