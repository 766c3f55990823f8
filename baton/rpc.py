"""How every gRPC server and channel of Baton is set up: sizes, keepalive, health, reflection, the errors of a bad port.

The health and reflection packages come with the router and worker extras; a client needs neither.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import DecodeError

from baton.errors import PortInUse

MAX_MESSAGE_BYTES = 64 * 1024 * 1024
"""Between Baton's own parts: a prompt of a million tokens and a ticket of all its blocks are far below."""

PARAM_METADATA = "baton-param"
"""Trailing metadata of every error status of Baton's own: the field that is wrong, or nothing."""

_KEEPALIVE_SECONDS = 10.0
_PING_TIMEOUT_SECONDS = 5.0


def channel_options(
    keepalive_seconds: float = _KEEPALIVE_SECONDS, ping_timeout_seconds: float = _PING_TIMEOUT_SECONDS
) -> list[tuple[str, int]]:
    """A peer that says nothing for `keepalive_seconds` is pinged, and given up `ping_timeout_seconds` later."""
    return [
        # A peer that is stopped or cut off keeps its TCP connection; only an unanswered ping tells.
        *_keepalive(keepalive_seconds, ping_timeout_seconds),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # A worker that comes back is to be found within a second, not after minutes of backoff.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        # Two channels to one address share a connection, and with it each other's flow control, unless told not to.
        ("grpc.use_local_subchannel_pool", 1),
    ]


def _keepalive(keepalive_seconds: float, ping_timeout_seconds: float) -> list[tuple[str, int]]:
    """Seen with gRPC 1.85: a keepalive ping is timed by ping_timeout, 60 s unless set, whatever keepalive_timeout
    says."""
    return [
        ("grpc.keepalive_time_ms", round(keepalive_seconds * 1000)),
        ("grpc.keepalive_timeout_ms", round(ping_timeout_seconds * 1000)),
        ("grpc.http2.ping_timeout_ms", round(ping_timeout_seconds * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
    ]


CHANNEL_OPTIONS = channel_options()

OpenChannel = Callable[[str, Sequence[tuple[str, int]]], grpc.aio.Channel]
"""From an address and options to a channel: passed in like a clock, for the simulator has a network of its own."""


def open_channel(address: str, options: Sequence[tuple[str, int]] = CHANNEL_OPTIONS) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=options)


def server_options(max_receive_bytes: int = MAX_MESSAGE_BYTES) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 0),  # else a second server on the port takes half of the connections, without an error
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        *_keepalive(_KEEPALIVE_SECONDS, _PING_TIMEOUT_SECONDS),
        ("grpc.max_receive_message_length", max_receive_bytes),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ]


def bind(server: grpc.aio.Server, host: str, port: int, flag: str = "--grpc-port") -> int:
    """The port that the server listens on. Raises PortInUse."""
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise PortInUse(
            f"cannot listen on {host}:{port}: it is in use or not this machine's; give another {flag}, or 0"
        )
    return bound


LIVENESS = "liveness"
"""What a liveness probe asks grpc.health.v1 for: serving while the process answers, ready or draining or not."""


class Health:
    """grpc.health.v1, overall and for each service; NOT_SERVING until told otherwise."""

    def __init__(self, server: grpc.aio.Server, files: Sequence[FileDescriptor]) -> None:
        """Adds health and reflection for all services of `files` to the server."""
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection

        self._status = health_pb2.HealthCheckResponse
        self._servicer = health.aio.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._servicer, server)
        services = [service.full_name for file in files for service in file.services_by_name.values()]
        self._names = ["", *services]
        reflection.enable_server_reflection([*services, health.SERVICE_NAME, reflection.SERVICE_NAME], server)

    async def set(self, serving: bool) -> None:
        await self._servicer.set(LIVENESS, self._status.SERVING)
        status = self._status.SERVING if serving else self._status.NOT_SERVING
        for name in self._names:
            await self._servicer.set(name, status)


def tolerant(deserializer: Callable[[bytes], Any], otherwise: Callable[[DecodeError], Any]) -> Callable[[bytes], Any]:
    """A deserializer that never fails: `otherwise` says what to take an unreadable message for. gRPC itself would end
    the call with a status of its own, and log a traceback."""

    def read(data: bytes) -> Any:
        try:
            return deserializer(data)
        except DecodeError as error:
            return otherwise(error)

    return read
