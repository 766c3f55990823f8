"""Our engine in this process, in threads of its own as in a worker: no RPC, no text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from queue import SimpleQueue
from typing import Any

import torch

from baton.config import WorkerConfig
from baton.errors import InternalError
from baton.ids import AttemptId
from baton.metrics import EngineMetrics, Metrics
from baton.sampling import SamplingParams
from bench.machine import synchronize
from bench.workloads import Job, fixed
from engine.device_runner import DeviceRunner
from engine.loader import LoadedModel
from engine.messages import AddRequest, Commit, Ended, EndReason, Event, Load, Reserved, Task, Tokens
from engine.thread import EngineThread
from kvtransfer.memory import PoolMemory
from worker.build import build
from worker.device_memory import DeviceMemory

_RANDOM_BLOCKS = 32
_UNTIMED_STEPS = 3
"""The first ones of a batch: it may still be filling up, and what they wait for is not yet planned ahead."""
_SECONDS = 3600.0
_REPEATS = 15


@dataclass(frozen=True)
class Steps:
    """Decode steps of a constant batch, in seconds."""

    wall: tuple[float, ...]
    """From what one step drew to what the next one drew."""
    forward: float
    """Of all of them together, within the model: embedding to logits. On a GPU what it takes for the last of them by
    itself, draw and all, so many times."""

    @property
    def gap(self) -> float:
        """Share of the wall time outside the forward: planning, preparing, drawing, taking in. On a GPU that in which
        it waits for these."""
        return 1 - self.forward / sum(self.wall)


@dataclass(frozen=True)
class _Told:
    """What the engine said at once."""

    at: float
    forward: float
    """Seconds within the model so far."""
    events: list[Event]

    @property
    def num_tokens(self) -> int:
        return sum(len(event.token_ids) for event in self.events if isinstance(event, Tokens))


class OwnEngine:
    name = "baton"
    limit: int | None = None

    def __init__(self, config: WorkerConfig, loaded: LoadedModel, device: torch.device) -> None:
        """`loaded` may be shared with another engine that does not run at the same time."""
        self._config, self._loaded, self._device = config, loaded, device
        self._forward = _clock_forward(loaded, device) if device.type == "cpu" else _Stopwatch()
        built = build(config, loaded, device, EngineMetrics(Metrics(), "bench"))
        self._runner = built.engine.runner
        self._told: SimpleQueue[_Told | BaseException] = SimpleQueue()
        self._thread = EngineThread(built.engine, self._on_events, self._told.put)
        self._thread.start()
        self._memory = built.memory
        if isinstance(self._memory, DeviceMemory):
            self._memory.cache.tensor.normal_()
        self.vocab_size = built.vocab_size
        self.max_model_len = built.max_model_len
        self._num_blocks = built.engine.load().blocks.total
        self._batches = 0

    def without_cache(self) -> OwnEngine:
        """The same model with a pool of its own that keeps nothing of what has ended."""
        cache = replace(self._config.cache, enable_prefix_caching=False)
        return OwnEngine(replace(self._config, cache=cache), self._loaded, self._device)

    def run(self, jobs: Sequence[Job]) -> float:
        """Seconds until the last token of all `jobs`."""
        ids = self._new_ids(len(jobs))
        started = time.perf_counter()
        for request, job in zip(ids, jobs, strict=True):
            prompt = tuple(job.prompt)
            self._thread.send(AddRequest(request, Task.LOCAL, prompt, len(prompt), _sampling(job.max_tokens)))
        told = self._until_ended(len(jobs))
        if sum(each.num_tokens for each in told) != sum(job.max_tokens for job in jobs):
            raise InternalError("another number of tokens was generated than the jobs ask for")
        return told[-1].at - started

    def decode_steps(self, batch: int, context: int, steps: int, salt: int) -> Steps | None:
        """Steps that draw a token behind about `context` tokens for each of `batch` sequences. None where they do not
        fit the pool, the model's length or the batch.

        The contexts are not computed: they come in as a decode worker's do, by reserving blocks, filling them (with
        noise), and committing them.
        """
        steps += 2 * _UNTIMED_STEPS
        if not self._fits(batch, context + steps + 1):
            return None
        jobs = fixed(self.vocab_size, salt, num_requests=batch, prompt=context)
        ids = self._new_ids(batch)
        for request, job in zip(ids, jobs, strict=True):
            sampling = _sampling(steps + 1)
            self._thread.send(AddRequest(request, Task.RECEIVE, tuple(job.prompt), context, sampling))
        reserved: list[Reserved] = []
        while len(reserved) < batch:
            reserved += [event for event in self._next().events if isinstance(event, Reserved)]
        if not isinstance(self._memory, DeviceMemory):  # which is all noise already
            noise = _noise(self._memory, self._loaded.dtype)
            for number, block in enumerate(ref for event in reserved for ref in event.blocks):
                self._memory.write(block.index, noise[number % len(noise)])
        for request in ids:
            self._thread.send(Commit(request, jobs[0].prompt[0]))
        full = [each for each in self._until_ended(batch) if each.num_tokens == batch][_UNTIMED_STEPS:]
        if len(full) < 2:
            raise InternalError(f"no two steps had the whole batch of {batch}")
        walls = tuple(after.at - before.at for before, after in pairwise(full))
        if isinstance(self._runner, DeviceRunner):
            return Steps(walls, len(walls) * _repeated_seconds(self._runner, batch))
        return Steps(walls, full[-1].forward - full[0].forward)

    def stop(self) -> None:
        self._thread.stop()

    def _on_events(self, events: list[Event], load: Load) -> None:
        self._told.put(_Told(time.perf_counter(), self._forward.seconds, events))

    def _next(self) -> _Told:
        told = self._told.get(timeout=_SECONDS)
        if isinstance(told, BaseException):
            raise told
        return told

    def _fits(self, batch: int, num_tokens: int) -> bool:
        blocks = batch * -(-num_tokens // self._config.cache.block_size)
        return (
            batch <= self._config.scheduler.on(self._device.type).max_num_seqs
            and num_tokens <= self.max_model_len
            and blocks <= self._num_blocks
        )

    def _until_ended(self, count: int) -> list[_Told]:
        """What is told until `count` requests have ended."""
        told, ended = [], 0
        while ended < count:
            told.append(self._next())
            ended += _count_ended(told[-1].events)
        return told

    def _new_ids(self, count: int) -> list[AttemptId]:
        self._batches += 1
        return [AttemptId(f"{self._batches}-{index}", 0) for index in range(count)]


def _sampling(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, ignore_eos=True, seed=0)


def _count_ended(events: Sequence[object]) -> int:
    ends = [event for event in events if isinstance(event, Ended)]
    for end in ends:
        if end.reason is not EndReason.LENGTH:
            raise InternalError(f"a request ended by {end.reason}: {end.message}")
    return len(ends)


def _noise(memory: PoolMemory, dtype: str) -> list[memoryview]:
    """Blocks of numbers as keys and values might be. Zeros of untouched memory would all be one page, in cache."""
    itemsize = getattr(torch, dtype).itemsize
    blocks = torch.randn(_RANDOM_BLOCKS, memory.block_bytes // itemsize).to(getattr(torch, dtype))
    return [memoryview(block.view(torch.uint8).numpy()) for block in blocks]


def _repeated_seconds(runner: DeviceRunner[Any], batch: int) -> float:
    """Of a decode step, when nothing is to be waited for."""
    times: list[float] = []
    for _ in range(_REPEATS):
        begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begun.record()
        runner.repeat_decode(batch)
        done.record()
        done.synchronize()
        times.append(float(begun.elapsed_time(done)) / 1000)
    return statistics.median(times)


class _Stopwatch:
    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, call: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            result = call(*args, **kwargs)
            synchronize(device)
            self.seconds += time.perf_counter() - started
            return result

        return timed


def _clock_forward(loaded: LoadedModel, device: torch.device) -> _Stopwatch:
    """Times the model's two entrances from now on."""
    watch = _Stopwatch()
    decoder = loaded.decoder
    # On the instance, for a measurement alone: production pays nothing for a hook.
    decoder.forward = watch.around(decoder.forward, device)  # type: ignore[method-assign]
    decoder.logits = watch.around(decoder.logits, device)  # type: ignore[method-assign]
    return watch
