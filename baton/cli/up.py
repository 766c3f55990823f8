"""`baton up`: Redis, prefill and decode workers and a router on one machine, each a process of its own.

Prints `baton ready grpc=HOST:PORT http=HOST:PORT` on stdout once requests can be served, and nothing else there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from urllib.parse import urlsplit

from baton import model_in_the_box
from baton.cli.supervisor import Part, Supervisor
from baton.client import Client
from baton.config import (
    GPU_MEMORY_UTILIZATION,
    DecodeConfig,
    RouterConfig,
    UpConfig,
    WorkerConfig,
    parse,
    to_argv,
)
from baton.errors import BatonError, ConfigError
from baton.v1 import inference_pb2

_STATUS_SECONDS = 0.1
_SAY_SECONDS = 5.0
_LOOPBACK = "127.0.0.1"


@dataclasses.dataclass(frozen=True)
class Counts:
    """How many workers of each role."""

    prefill: int
    decode: int
    unified: int

    @classmethod
    def of(cls, config: UpConfig) -> Counts:
        """Raises ConfigError where the workers could not serve a request between them."""
        unified = config.unified or 0
        usual = 0 if unified else 1
        prefill = usual if config.prefill is None else config.prefill
        decode = usual if config.decode is None else config.decode
        if prefill == 0 and unified == 0:
            raise ConfigError(
                "--prefill 0 leaves no worker for prompts; give --prefill 1 or more, or --unified 1 or more"
            )
        if decode == 0 and unified == 0:
            raise ConfigError("--decode 0 leaves no worker to decode; give --decode 1 or more, or --unified 1")
        return cls(prefill, decode, unified)

    @property
    def total(self) -> int:
        return self.prefill + self.decode + self.unified


def main(argv: Sequence[str]) -> int:
    config = parse(UpConfig, argv, prog="baton up")
    config = dataclasses.replace(config, model=model_in_the_box.resolve(config.model))
    counts = Counts.of(config)
    asyncio.run(_run(config, counts))
    return 0


async def _run(config: UpConfig, counts: Counts) -> None:
    started = time.monotonic()

    def say(line: str) -> None:
        print(f"[{time.monotonic() - started:5.1f} s] {line}", file=sys.stderr, flush=True)

    asked_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, asked_to_stop.set)
    supervisor = Supervisor(say)
    redis: list[Part] = []
    workers: list[Part] = []
    routers: list[Part] = []
    try:
        if not config.discovery.redis_url:
            redis.append(Part("redis", [sys.executable, "-m", "discovery"]))
            await supervisor.start(redis[0])
            await supervisor.wait_ready(redis)
            url = redis[0].ready["url"]
            redis[0].argv = [*redis[0].argv, "--port", str(urlsplit(url).port)]  # as all others know it
            config = dataclasses.replace(config, discovery=dataclasses.replace(config.discovery, redis_url=url))
            say(f"redis ready at {url}")
        routers.append(Part("router", [sys.executable, "-m", "router", *to_argv(router_config(config))]))
        workers += worker_parts(config, counts, embedded=bool(redis))
        say("starting " + ", ".join(part.name for part in [*routers, *workers]))
        for part in [*routers, *workers]:
            await supervisor.start(part)
        serving = asyncio.create_task(_until_serving(supervisor, routers[0], workers, say))
        stopping = asyncio.create_task(asked_to_stop.wait())
        await asyncio.wait((serving, stopping, supervisor.failed), return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
            ready = routers[0].ready
            fixed = dataclasses.replace(config, grpc_port=_port(ready["grpc"]), http_port=_port(ready["http"]))
            routers[0].argv = [sys.executable, "-m", "router", *to_argv(router_config(fixed))]
            print(f"baton ready grpc={ready['grpc']} http={ready['http']}", flush=True)
            await asyncio.wait((stopping, supervisor.failed), return_when=asyncio.FIRST_COMPLETED)
        serving.cancel()
        if supervisor.failed.done():
            raise ConfigError(supervisor.failed.result())
        say(f"draining, for at most {config.drain_seconds:.0f} s")
    finally:
        await supervisor.stop([routers, workers, redis], config.drain_seconds + 5)
        say("stopped")


def router_config(config: UpConfig) -> RouterConfig:
    return RouterConfig(
        model=config.model.model,
        discovery=config.discovery,
        routing=config.routing,
        log=config.log,
        host=config.host,
        grpc_port=config.grpc_port,
        http_port=config.http_port,
        drain_seconds=config.drain_seconds,
    )


def worker_parts(config: UpConfig, counts: Counts, *, embedded: bool) -> list[Part]:
    # A Redis of our own has no other workers; in a shared one names must not meet.
    suffix = "" if embedded else f"-{os.getpid()}"
    threads = config.model.threads or max(1, (os.cpu_count() or 1) // counts.total)
    utilization = config.cache.gpu_memory_utilization or GPU_MEMORY_UTILIZATION / counts.total
    settings: dict[str, Any] = {
        "model": dataclasses.replace(config.model, threads=threads),
        "cache": dataclasses.replace(config.cache, gpu_memory_utilization=utilization),
        "scheduler": config.scheduler,
        "transfer": config.transfer,
        "discovery": config.discovery,
        "log": config.log,
        "host": _LOOPBACK,  # what workers say to each other is not for others' ears, wherever the doors listen
        "drain_seconds": config.drain_seconds,
    }
    parts: list[Part] = []
    for role, count in (("prefill", counts.prefill), ("decode", counts.decode), ("unified", counts.unified)):
        for number in range(count):
            name = f"{role}-{number}"
            worker: WorkerConfig
            if role == "prefill":
                worker = WorkerConfig(worker_id=name + suffix, **settings)
            else:
                worker = DecodeConfig(worker_id=name + suffix, unified=role == "unified", **settings)
            module = "prefill_worker" if role == "prefill" else "decode_worker"
            parts.append(Part(name, [sys.executable, "-m", module, *to_argv(worker)]))
    return parts


async def _until_serving(
    supervisor: Supervisor, router: Part, workers: Sequence[Part], say: Callable[[str], None]
) -> None:
    """Until every worker is up and the router is connected to all of them."""
    await supervisor.wait_ready([router, *workers])
    waited = 0.0
    async with Client(router.ready["grpc"]) as client:
        while True:
            try:
                status = await client.status()
            except BatonError:
                status = inference_pb2.GetStatusResponse()
            ready = [w for w in status.workers if w.state == inference_pb2.WORKER_STATE_READY]
            if len(ready) >= len(workers) and status.models:
                return
            await asyncio.sleep(_STATUS_SECONDS)
            waited += _STATUS_SECONDS
            if waited >= _SAY_SECONDS:
                waited = 0.0
                missing = {part.ready["id"] for part in workers} - {w.id for w in ready}
                details = "; ".join(f"({w.id}: {w.detail})" for w in status.workers if w.id in missing and w.detail)
                say(f"the router is not connected to {', '.join(sorted(missing))} yet {details}".rstrip())


def _port(address: str) -> int:
    return int(address.rsplit(":", 1)[1])
