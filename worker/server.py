"""A worker's process: from its configuration to a served port, and from SIGTERM to an empty pool.

What can be wrong is found as early as it can be: ports and Redis before the weights are read.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, replace

import grpc
import uvloop
from prometheus_client import start_http_server

from baton import logs, model_in_the_box
from baton.config import WorkerConfig
from baton.errors import BatonError, InternalError, PortInUse
from baton.ids import WorkerId, new_incarnation
from baton.metrics import EngineMetrics, Metrics, RequestMetrics, TransferMetrics, WorkerMetrics
from baton.model_files import local_directory
from baton.rpc import Health, bind, server_options
from baton.v1 import inference_pb2, transfer_pb2, worker_pb2, worker_pb2_grpc
from discovery import Redis, Registration, WorkerRecord, WorkerRole, connect
from engine.thread import EngineThread
from worker.build import Built, build, load
from worker.core import WorkerCore
from worker.role import Role, SendCommand
from worker.session import WorkerService
from worker.unreadable import UnreadableAsEmpty

log = logging.getLogger(__name__)

_ROLES = {
    WorkerRole.PREFILL: inference_pb2.WORKER_ROLE_PREFILL,
    WorkerRole.DECODE: inference_pb2.WORKER_ROLE_DECODE,
    WorkerRole.UNIFIED: inference_pb2.WORKER_ROLE_UNIFIED,
}
_GOODBYE_SECONDS = 1.0


@dataclass(frozen=True)
class _Doors:
    """What is bound and connected before the model is read."""

    server: grpc.aio.Server
    address: str
    """`host:port` of the gRPC server, as others reach it."""
    metrics: str
    redis: Redis | None


@dataclass(frozen=True)
class Surroundings:
    """What a role's block transfers need to know of the worker."""

    config: WorkerConfig
    record: WorkerRecord
    built: Built
    metrics: TransferMetrics
    worker_metrics: WorkerMetrics
    server: grpc.aio.Server
    """To add a service to, before it starts."""
    stack: AsyncExitStack
    """What is put here is closed at the end."""


MakeRole = Callable[[WorkerCore, SendCommand, Surroundings], Role]


def main(role: WorkerRole, config: WorkerConfig, make_role: MakeRole) -> int:
    part = "prefill" if role is WorkerRole.PREFILL else "decode"
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until it serves, Ctrl-C ends the worker at once
    logs.configure(config.log.log_level, config.worker_id or part)
    try:
        config = replace(config, model=model_in_the_box.resolve(config.model))
        uvloop.run(_serve(part, role, config, make_role))
    except BatonError as error:
        print(f"baton {part}: {error.message}", file=sys.stderr)
        return 1
    return 0


async def _serve(part: str, role: WorkerRole, config: WorkerConfig, make_role: MakeRole) -> None:
    loop = asyncio.get_running_loop()
    metrics, name = Metrics(), served_name(config)
    async with AsyncExitStack() as stack:
        doors = await _open_doors(config, metrics, stack)
        # This takes seconds or minutes. Nothing is held until it is done, so a signal may end the process as it stands.
        model, device = await loop.run_in_executor(None, load, config)
        built = await loop.run_in_executor(None, build, config, model, device, EngineMetrics(metrics, name))
        stopping = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        record = _record(part, role, config, doors, built, name)
        registration = _registration(config, doors, record)

        failures: list[BaseException] = []

        def failed(error: BaseException) -> None:
            failures.append(error)
            stopping.set()

        engine = EngineThread(
            built.engine,
            on_events=lambda events, now: _hop(loop, lambda: core.on_engine_events(events, now)),
            on_failure=lambda error: _hop(loop, lambda: failed(error)),
        )
        worker_metrics = WorkerMetrics(metrics)
        surroundings = Surroundings(
            config, record, built, TransferMetrics(metrics), worker_metrics, doors.server, stack
        )  # fmt: skip
        core = WorkerCore(
            lambda core: make_role(core, engine.send, surroundings),
            vocab_size=built.vocab_size,
            block_events=registration,
            request_metrics=RequestMetrics(metrics, name),
            metrics=worker_metrics,
        )
        service = WorkerService(core, _hello(record, built))
        worker_pb2_grpc.add_WorkerServicer_to_server(service, doors.server)
        health = Health(doors.server, [worker_pb2.DESCRIPTOR, transfer_pb2.DESCRIPTOR])
        engine.start()
        await doors.server.start()
        if registration is not None:
            await registration.start()
        await health.set(True)
        print(f"baton {part} ready id={record.id} grpc={record.address} metrics={record.metrics}", flush=True)

        await stopping.wait()
        await health.set(False)
        if registration is not None:
            await registration.stop()
        if failures:
            core.end_all("the worker's engine failed")
        else:
            await core.drain(config.drain_seconds)
        await doors.server.stop(_GOODBYE_SECONDS)
        await loop.run_in_executor(None, engine.stop)
    if failures:
        raise InternalError(f"the engine failed: {failures[0]}")
    log.info("stopped")


def _hop(loop: asyncio.AbstractEventLoop, call: Callable[[], None]) -> None:
    """From the engine's thread to the event loop."""
    with suppress(RuntimeError):  # the loop is closed: the process ends
        loop.call_soon_threadsafe(call)


async def _open_doors(config: WorkerConfig, metrics: Metrics, stack: AsyncExitStack) -> _Doors:
    """Raises PortInUse, RedisUnreachable."""
    server = grpc.aio.server(interceptors=[UnreadableAsEmpty()], options=server_options())
    grpc_port = bind(server, config.host, config.grpc_port)
    metrics_port = _serve_metrics(config, metrics)
    redis = None
    if config.discovery.redis_url:
        redis = await connect(config.discovery.redis_url)
        stack.push_async_callback(redis.aclose)
    else:
        log.warning("no --redis-url: no router will find this worker by itself")
    host = config.advertise_host or config.host
    return _Doors(server, f"{host}:{grpc_port}", f"{host}:{metrics_port}", redis)


def _record(part: str, role: WorkerRole, config: WorkerConfig, doors: _Doors, built: Built, name: str) -> WorkerRecord:
    return WorkerRecord(
        id=WorkerId(config.worker_id or f"{part}-{socket.gethostname()}-{os.getpid()}"),
        incarnation=new_incarnation(),
        role=role,
        address=doors.address,
        metrics=doors.metrics,
        pid=os.getpid(),
        model=name,
        block_size=built.layout.block_size,
        model_fingerprint=built.layout.model_fingerprint,
    )


def _registration(config: WorkerConfig, doors: _Doors, record: WorkerRecord) -> Registration | None:
    if doors.redis is None:
        return None
    discovery = config.discovery
    return Registration(
        doors.redis, record, namespace=discovery.namespace, heartbeat_seconds=discovery.heartbeat_seconds
    )


def _hello(record: WorkerRecord, built: Built) -> worker_pb2.Hello:
    return worker_pb2.Hello(
        worker_id=record.id,
        incarnation=record.incarnation,
        role=_ROLES[record.role],
        model=worker_pb2.ModelInfo(
            name=record.model,
            max_model_len=built.max_model_len,
            block_size=built.layout.block_size,
            vocab_size=built.vocab_size,
            max_prompt_len=built.max_model_len - 1,
            model_fingerprint=built.layout.model_fingerprint,
            layout_fingerprint=built.layout.fingerprint,
            source=built.source,
            eos_token_ids=built.eos_token_ids,
            layout=built.layout.to_proto(),
        ),
        pid=record.pid,
        metrics=record.metrics,
    )


def served_name(config: WorkerConfig) -> str:
    """As `--served-model-name` says; else a directory's last part, or the hub id."""
    directory = local_directory(config.model.model)
    return config.model.served_model_name or (directory.name if directory else config.model.model)


def _serve_metrics(config: WorkerConfig, metrics: Metrics) -> int:
    try:
        server, _ = start_http_server(config.metrics_port, config.host, metrics.registry)
    except OSError as error:
        raise PortInUse(
            f"cannot listen on {config.host}:{config.metrics_port}: {error.strerror}; give another --metrics-port, or 0"
        ) from None
    return int(server.server_port)
