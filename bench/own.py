"""Our engine in this process: no RPC, no text. Drives it as a worker's thread does, and times its steps."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from baton.config import WorkerConfig
from baton.errors import InternalError
from baton.ids import AttemptId
from baton.metrics import EngineMetrics, Metrics
from baton.sampling import SamplingParams
from bench.machine import synchronize
from bench.workloads import Job, fixed
from engine.loader import LoadedModel
from engine.messages import AddRequest, Commit, Ended, EndReason, Reserved, Task, Tokens
from kvtransfer.memory import PoolMemory
from worker.build import build

_RANDOM_BLOCKS = 32
_UNTIMED_STEPS = 2


@dataclass(frozen=True)
class Steps:
    """Decode steps of a constant batch, one value a step, in seconds."""

    wall: tuple[float, ...]
    forward: tuple[float, ...]
    """Within the model: embedding to logits."""

    @property
    def gap(self) -> float:
        """Share of the wall time outside the forward: planning, preparing, drawing, taking in."""
        return 1 - sum(self.forward) / sum(self.wall)


class OwnEngine:
    name = "baton"
    limit: int | None = None

    def __init__(self, config: WorkerConfig, loaded: LoadedModel, device: torch.device) -> None:
        """`loaded` may be shared with another engine that does not run at the same time."""
        self._config, self._loaded, self._device = config, loaded, device
        self._forward = _clock_forward(loaded, device)
        built = build(config, loaded, device, EngineMetrics(Metrics(), "bench"))
        self._engine = built.engine
        self._memory = built.memory
        self.vocab_size = built.vocab_size
        self.max_model_len = built.max_model_len
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
            self._engine.handle(AddRequest(request, Task.LOCAL, prompt, len(prompt), _sampling(job.max_tokens)))
        generated = self._finish(len(jobs))
        seconds = time.perf_counter() - started
        if generated != sum(job.max_tokens for job in jobs):
            raise InternalError(f"{generated} tokens were generated; the jobs ask for others")
        return seconds

    def decode_steps(self, batch: int, context: int, steps: int, salt: int) -> Steps | None:
        """Steps that draw a token behind about `context` tokens for each of `batch` sequences. None where they do not
        fit the pool, the model's length or the batch.

        The contexts are not computed: they come in as a decode worker's do, by reserving blocks, filling them (with
        noise), and committing them.
        """
        steps += _UNTIMED_STEPS
        if not self._fits(batch, context + steps + 1):
            return None
        jobs = fixed(self.vocab_size, salt, num_requests=batch, prompt=context)
        ids = self._new_ids(batch)
        for request, job in zip(ids, jobs, strict=True):
            sampling = _sampling(steps + 1)
            self._engine.handle(AddRequest(request, Task.RECEIVE, tuple(job.prompt), context, sampling))
        self._engine.step()
        reserved = [event for event in self._engine.drain_events() if isinstance(event, Reserved)]
        if len(reserved) != batch:
            raise InternalError(f"{len(reserved)} of {batch} requests had blocks reserved for them")
        noise = _noise(self._memory, self._loaded.dtype)
        for number, block in enumerate(ref for event in reserved for ref in event.blocks):
            self._memory.write(block.index, noise[number % len(noise)])
        for request in ids:
            self._engine.handle(Commit(request, jobs[0].prompt[0]))
        return self._timed_steps(batch)

    def _timed_steps(self, batch: int) -> Steps:
        walls, forwards, ended = [], [], 0
        while ended < batch:
            before_forward, before = self._forward.seconds, time.perf_counter()
            computed = self._engine.step()
            events = self._engine.drain_events()
            walls.append(time.perf_counter() - before)
            forwards.append(self._forward.seconds - before_forward)
            ended += _count_ended(events)
            if not computed and ended < batch:
                raise InternalError("the engine has nothing to compute and requests are open")
        return Steps(tuple(walls[_UNTIMED_STEPS:]), tuple(forwards[_UNTIMED_STEPS:]))

    def _fits(self, batch: int, num_tokens: int) -> bool:
        blocks = batch * -(-num_tokens // self._config.cache.block_size)
        room = self._engine.load().blocks.available
        return batch <= self._config.scheduler.max_num_seqs and num_tokens <= self.max_model_len and blocks <= room

    def _finish(self, count: int) -> int:
        """Until `count` requests have ended; how many tokens came."""
        generated, ended = 0, 0
        while ended < count:
            computed = self._engine.step()
            events = self._engine.drain_events()
            generated += sum(len(event.token_ids) for event in events if isinstance(event, Tokens))
            ended += _count_ended(events)
            if not computed and ended < count:
                raise InternalError("the engine has nothing to compute and requests are open")
        return generated

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
