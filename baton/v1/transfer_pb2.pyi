from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class RefusalReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REFUSAL_REASON_UNSPECIFIED: _ClassVar[RefusalReason]
    REFUSAL_REASON_UNKNOWN_TRANSFER: _ClassVar[RefusalReason]
    REFUSAL_REASON_STALE_INCARNATION: _ClassVar[RefusalReason]
    REFUSAL_REASON_LAYOUT_MISMATCH: _ClassVar[RefusalReason]
    REFUSAL_REASON_EXPIRED: _ClassVar[RefusalReason]
    REFUSAL_REASON_ABORTED: _ClassVar[RefusalReason]
    REFUSAL_REASON_MALFORMED: _ClassVar[RefusalReason]
REFUSAL_REASON_UNSPECIFIED: RefusalReason
REFUSAL_REASON_UNKNOWN_TRANSFER: RefusalReason
REFUSAL_REASON_STALE_INCARNATION: RefusalReason
REFUSAL_REASON_LAYOUT_MISMATCH: RefusalReason
REFUSAL_REASON_EXPIRED: RefusalReason
REFUSAL_REASON_ABORTED: RefusalReason
REFUSAL_REASON_MALFORMED: RefusalReason

class Ticket(_message.Message):
    __slots__ = ("transfer_id", "worker_id", "address", "incarnation", "layout_fingerprint", "blocks", "lease_ms", "num_tokens", "request_id", "attempt")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    worker_id: str
    address: str
    incarnation: int
    layout_fingerprint: bytes
    blocks: _containers.RepeatedCompositeFieldContainer[TicketBlock]
    lease_ms: int
    num_tokens: int
    request_id: str
    attempt: int
    def __init__(self, transfer_id: _Optional[bytes] = ..., worker_id: _Optional[str] = ..., address: _Optional[str] = ..., incarnation: _Optional[int] = ..., layout_fingerprint: _Optional[bytes] = ..., blocks: _Optional[_Iterable[_Union[TicketBlock, _Mapping]]] = ..., lease_ms: _Optional[int] = ..., num_tokens: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class TicketBlock(_message.Message):
    __slots__ = ("index", "generation", "hash")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    GENERATION_FIELD_NUMBER: _ClassVar[int]
    HASH_FIELD_NUMBER: _ClassVar[int]
    index: int
    generation: int
    hash: bytes
    def __init__(self, index: _Optional[int] = ..., generation: _Optional[int] = ..., hash: _Optional[bytes] = ...) -> None: ...

class PullRequest(_message.Message):
    __slots__ = ("claim", "renew", "release")
    CLAIM_FIELD_NUMBER: _ClassVar[int]
    RENEW_FIELD_NUMBER: _ClassVar[int]
    RELEASE_FIELD_NUMBER: _ClassVar[int]
    claim: Claim
    renew: Renew
    release: Release
    def __init__(self, claim: _Optional[_Union[Claim, _Mapping]] = ..., renew: _Optional[_Union[Renew, _Mapping]] = ..., release: _Optional[_Union[Release, _Mapping]] = ...) -> None: ...

class Claim(_message.Message):
    __slots__ = ("transfer_id", "incarnation", "request_id", "attempt", "layout_fingerprint", "first_block", "worker_id", "transports")
    TRANSFER_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    FIRST_BLOCK_FIELD_NUMBER: _ClassVar[int]
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    transfer_id: bytes
    incarnation: int
    request_id: str
    attempt: int
    layout_fingerprint: bytes
    first_block: int
    worker_id: str
    transports: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, transfer_id: _Optional[bytes] = ..., incarnation: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., layout_fingerprint: _Optional[bytes] = ..., first_block: _Optional[int] = ..., worker_id: _Optional[str] = ..., transports: _Optional[_Iterable[str]] = ...) -> None: ...

class Renew(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Release(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PullResponse(_message.Message):
    __slots__ = ("claimed", "sealed", "prefilled", "renewed", "refused")
    CLAIMED_FIELD_NUMBER: _ClassVar[int]
    SEALED_FIELD_NUMBER: _ClassVar[int]
    PREFILLED_FIELD_NUMBER: _ClassVar[int]
    RENEWED_FIELD_NUMBER: _ClassVar[int]
    REFUSED_FIELD_NUMBER: _ClassVar[int]
    claimed: Claimed
    sealed: Sealed
    prefilled: Prefilled
    renewed: Renewed
    refused: Refused
    def __init__(self, claimed: _Optional[_Union[Claimed, _Mapping]] = ..., sealed: _Optional[_Union[Sealed, _Mapping]] = ..., prefilled: _Optional[_Union[Prefilled, _Mapping]] = ..., renewed: _Optional[_Union[Renewed, _Mapping]] = ..., refused: _Optional[_Union[Refused, _Mapping]] = ...) -> None: ...

class Claimed(_message.Message):
    __slots__ = ("endpoints", "lease_ms")
    ENDPOINTS_FIELD_NUMBER: _ClassVar[int]
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    endpoints: _containers.RepeatedCompositeFieldContainer[Endpoint]
    lease_ms: int
    def __init__(self, endpoints: _Optional[_Iterable[_Union[Endpoint, _Mapping]]] = ..., lease_ms: _Optional[int] = ...) -> None: ...

class Endpoint(_message.Message):
    __slots__ = ("transport", "address")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    transport: str
    address: bytes
    def __init__(self, transport: _Optional[str] = ..., address: _Optional[bytes] = ...) -> None: ...

class Renewed(_message.Message):
    __slots__ = ("lease_ms",)
    LEASE_MS_FIELD_NUMBER: _ClassVar[int]
    lease_ms: int
    def __init__(self, lease_ms: _Optional[int] = ...) -> None: ...

class Sealed(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[SealedBlock]
    def __init__(self, blocks: _Optional[_Iterable[_Union[SealedBlock, _Mapping]]] = ...) -> None: ...

class SealedBlock(_message.Message):
    __slots__ = ("position", "checksum")
    POSITION_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    position: int
    checksum: int
    def __init__(self, position: _Optional[int] = ..., checksum: _Optional[int] = ...) -> None: ...

class Prefilled(_message.Message):
    __slots__ = ("token_id",)
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    def __init__(self, token_id: _Optional[int] = ...) -> None: ...

class Refused(_message.Message):
    __slots__ = ("reason", "message")
    REASON_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    reason: RefusalReason
    message: str
    def __init__(self, reason: _Optional[_Union[RefusalReason, str]] = ..., message: _Optional[str] = ...) -> None: ...
