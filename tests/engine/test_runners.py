"""What a worker on a GPU does where the GPU can't do what it should; no GPU is asked."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from baton.errors import ConfigError
from baton.layout import KVLayout
from engine import memory, runners
from engine.kv_cache import choose_num_blocks
from engine.runners import RunnerLimits, make_runner

_GIB = 1 << 30
_LIMITS = RunnerLimits(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=40)
_CACHE: Any = SimpleNamespace(device=torch.device("cuda"), layout=SimpleNamespace(block_size=4))
_MODEL: Any = SimpleNamespace(device=torch.device("cuda"), spec=None)


class _Device:
    """In the place of DeviceRunner."""

    warmed: list[int]
    failure: Exception | None = None

    def __init__(self, *_: object, **__: object) -> None:
        type(self).warmed = []

    def warm_up(self, num_tokens: int) -> None:
        if self.failure is not None:
            raise self.failure
        self.warmed.append(num_tokens)

    def warm_up_decode(self) -> None:
        self.warmed.append(0)

    def record(self) -> Iterator[tuple[int, int]]:
        yield 1, 1


class _Plain:
    """In the place of ModelRunner."""

    def __init__(self, *_: object, **__: object) -> None:
        pass

    def warm_up(self, num_tokens: int) -> None:
        pass


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(runners, "Cuda", lambda: None)
    monkeypatch.setattr(runners, "device_kernels", lambda *_: SimpleNamespace(attention=None, sampler=None))
    monkeypatch.setattr(runners, "DeviceRunner", _Device)
    monkeypatch.setattr(runners, "ModelRunner", _Plain)
    monkeypatch.setattr(_Device, "failure", None)


def test_steps_of_all_sizes_have_been_taken_before_it_is_ready() -> None:
    assert isinstance(make_runner(_MODEL, _CACHE, _LIMITS), _Device)
    assert _Device.warmed == [16, 0, 64, 32, 16]


def test_a_kernel_that_a_device_cannot_have_leaves_torch_and_one_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(_Device, "failure", RuntimeError("out of resource: shared memory,\n  wanted 300000"))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert isinstance(make_runner(_MODEL, _CACHE, _LIMITS), _Plain)
    (line,) = caplog.messages
    assert "RuntimeError: out of resource: shared memory, wanted 300000" in line
    assert "torch's operations do" in line


def test_too_little_memory_for_a_step_is_an_error_that_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Device, "failure", torch.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(ConfigError, match=r"steps of 64 tokens of 4 requests: give a smaller --max-num-batched-tokens"):
        make_runner(_MODEL, _CACHE, _LIMITS)


def _room(monkeypatch: pytest.MonkeyPatch, *, free: int, held: int, utilization: float) -> memory.MemoryRoom:
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * _GIB, 100 * _GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: held * _GIB)
    return memory.room(torch.device("cuda"), utilization, activations=5 * _GIB)


@pytest.mark.parametrize(
    ("free", "utilization", "expected"),
    [
        (80, 0.5, 50 - 20 - 5),  # its part, less weights and steps
        (80, 1.0, 80 - 5),  # no more than is free
        (12, 0.5, 12 - 5),  # others have the rest
    ],
)
def test_the_pool_gets_what_weights_and_steps_leave(
    free: int, utilization: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = _room(monkeypatch, free=free, held=20, utilization=utilization)
    assert expected - 1 < room.for_pool / _GIB <= expected


def test_a_gpu_without_room_for_a_block_says_what_takes_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    room = _room(monkeypatch, free=30, held=60, utilization=0.6)
    layout = KVLayout(2, 2, 16, 64, "bfloat16", b"m")
    with pytest.raises(ConfigError) as refused:
        choose_num_blocks(layout, 0, max_num_seqs=4, max_model_len=64, room=room)
    assert "this process holds 61440, its steps take 5120: give a higher --gpu-memory-utilization" in str(refused.value)
