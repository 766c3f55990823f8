"""A router that has no workers yet, as Kubernetes' probes see it: alive, not ready, and gone soon after SIGTERM."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from baton.rpc import LIVENESS
from discovery import EmbeddedRedis

ROOT = Path(__file__).resolve().parents[2]
Status = health_pb2.HealthCheckResponse


@pytest.fixture
def router() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, and the address of its gRPC door."""
    with EmbeddedRedis() as redis:
        command = [sys.executable, "-m", "router", "--grpc-port=0", "--http-port=0", f"--redis-url={redis.url}"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        with process, process.stdout:
            try:
                line = process.stdout.readline()
                assert " ready " in line
                yield process, dict(word.split("=", 1) for word in line.split() if "=" in word)["grpc"]
            finally:
                process.kill()


def _check(address: str, service: str) -> int:
    with grpc.insecure_channel(address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=10, wait_for_ready=True)
        return int(answer.status)


@pytest.mark.slow
def test_a_router_without_workers_is_alive_and_not_ready(router: tuple[subprocess.Popen[str], str]) -> None:
    _, address = router
    assert _check(address, LIVENESS) == Status.SERVING
    assert _check(address, "") == Status.NOT_SERVING


@pytest.mark.slow
def test_an_idle_router_ends_at_once_on_sigterm(router: tuple[subprocess.Popen[str], str]) -> None:
    process, _ = router
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 0
