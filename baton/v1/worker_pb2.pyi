from baton.v1 import inference_pb2 as _inference_pb2
from baton.v1 import transfer_pb2 as _transfer_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Task(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_UNSPECIFIED: _ClassVar[Task]
    TASK_PREFILL: _ClassVar[Task]
    TASK_RECEIVE: _ClassVar[Task]
    TASK_LOCAL: _ClassVar[Task]

class EndReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    END_REASON_UNSPECIFIED: _ClassVar[EndReason]
    END_REASON_STOP: _ClassVar[EndReason]
    END_REASON_LENGTH: _ClassVar[EndReason]
    END_REASON_PREFILLED: _ClassVar[EndReason]
    END_REASON_CANCELLED: _ClassVar[EndReason]
    END_REASON_DEADLINE: _ClassVar[EndReason]
    END_REASON_INVALID: _ClassVar[EndReason]
    END_REASON_HANDOFF_FAILED: _ClassVar[EndReason]
    END_REASON_UNAVAILABLE: _ClassVar[EndReason]
TASK_UNSPECIFIED: Task
TASK_PREFILL: Task
TASK_RECEIVE: Task
TASK_LOCAL: Task
END_REASON_UNSPECIFIED: EndReason
END_REASON_STOP: EndReason
END_REASON_LENGTH: EndReason
END_REASON_PREFILLED: EndReason
END_REASON_CANCELLED: EndReason
END_REASON_DEADLINE: EndReason
END_REASON_INVALID: EndReason
END_REASON_HANDOFF_FAILED: EndReason
END_REASON_UNAVAILABLE: EndReason

class SessionRequest(_message.Message):
    __slots__ = ("submit", "handoff", "cancel")
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    submit: Submit
    handoff: Handoff
    cancel: Cancel
    def __init__(self, submit: _Optional[_Union[Submit, _Mapping]] = ..., handoff: _Optional[_Union[Handoff, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ...) -> None: ...

class SessionResponse(_message.Message):
    __slots__ = ("hello", "step")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    step: Step
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ...) -> None: ...

class Hello(_message.Message):
    __slots__ = ("worker_id", "incarnation", "role", "model", "pid", "metrics")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    incarnation: int
    role: _inference_pb2.WorkerRole
    model: ModelInfo
    pid: int
    metrics: str
    def __init__(self, worker_id: _Optional[str] = ..., incarnation: _Optional[int] = ..., role: _Optional[_Union[_inference_pb2.WorkerRole, str]] = ..., model: _Optional[_Union[ModelInfo, _Mapping]] = ..., pid: _Optional[int] = ..., metrics: _Optional[str] = ...) -> None: ...

class ModelInfo(_message.Message):
    __slots__ = ("name", "max_model_len", "block_size", "vocab_size", "max_prompt_len", "model_fingerprint", "layout_fingerprint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    MAX_PROMPT_LEN_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    max_model_len: int
    block_size: int
    vocab_size: int
    max_prompt_len: int
    model_fingerprint: bytes
    layout_fingerprint: bytes
    def __init__(self, name: _Optional[str] = ..., max_model_len: _Optional[int] = ..., block_size: _Optional[int] = ..., vocab_size: _Optional[int] = ..., max_prompt_len: _Optional[int] = ..., model_fingerprint: _Optional[bytes] = ..., layout_fingerprint: _Optional[bytes] = ...) -> None: ...

class AttemptId(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("id", "task", "token_ids", "num_prompt_tokens", "sampling", "cache_salt", "deadline_seconds")
    ID_FIELD_NUMBER: _ClassVar[int]
    TASK_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    NUM_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    DEADLINE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    id: AttemptId
    task: Task
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    num_prompt_tokens: int
    sampling: _inference_pb2.SamplingParams
    cache_salt: bytes
    deadline_seconds: float
    def __init__(self, id: _Optional[_Union[AttemptId, _Mapping]] = ..., task: _Optional[_Union[Task, str]] = ..., token_ids: _Optional[_Iterable[int]] = ..., num_prompt_tokens: _Optional[int] = ..., sampling: _Optional[_Union[_inference_pb2.SamplingParams, _Mapping]] = ..., cache_salt: _Optional[bytes] = ..., deadline_seconds: _Optional[float] = ...) -> None: ...

class Handoff(_message.Message):
    __slots__ = ("id", "ticket")
    ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    id: AttemptId
    ticket: _transfer_pb2.Ticket
    def __init__(self, id: _Optional[_Union[AttemptId, _Mapping]] = ..., ticket: _Optional[_Union[_transfer_pb2.Ticket, _Mapping]] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("id",)
    ID_FIELD_NUMBER: _ClassVar[int]
    id: AttemptId
    def __init__(self, id: _Optional[_Union[AttemptId, _Mapping]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("events", "load", "draining")
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[RequestEvent]
    load: _inference_pb2.Load
    draining: bool
    def __init__(self, events: _Optional[_Iterable[_Union[RequestEvent, _Mapping]]] = ..., load: _Optional[_Union[_inference_pb2.Load, _Mapping]] = ..., draining: _Optional[bool] = ...) -> None: ...

class RequestEvent(_message.Message):
    __slots__ = ("id", "ticket", "tokens", "landed", "ended")
    ID_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LANDED_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    id: AttemptId
    ticket: _transfer_pb2.Ticket
    tokens: Tokens
    landed: Landed
    ended: Ended
    def __init__(self, id: _Optional[_Union[AttemptId, _Mapping]] = ..., ticket: _Optional[_Union[_transfer_pb2.Ticket, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., landed: _Optional[_Union[Landed, _Mapping]] = ..., ended: _Optional[_Union[Ended, _Mapping]] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("index", "token_ids", "cached_tokens")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    index: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    cached_tokens: int
    def __init__(self, index: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., cached_tokens: _Optional[int] = ...) -> None: ...

class Landed(_message.Message):
    __slots__ = ("seconds", "blocks", "bytes", "transport")
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    seconds: float
    blocks: int
    bytes: int
    transport: str
    def __init__(self, seconds: _Optional[float] = ..., blocks: _Optional[int] = ..., bytes: _Optional[int] = ..., transport: _Optional[str] = ...) -> None: ...

class Ended(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: EndReason
    message: str
    def __init__(self, reason: _Optional[_Union[EndReason, str]] = ..., message: _Optional[str] = ...) -> None: ...
