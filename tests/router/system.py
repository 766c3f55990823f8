"""A router's core over fake workers and a directory in memory."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from baton.clock import MonotonicClock
from baton.config import RoutingConfig
from baton.ids import BlockHash, Incarnation, WorkerId
from baton.metrics import Metrics, RouterMetrics
from baton.sampling import SamplingParams
from discovery import WorkerRecord, WorkerRole
from router.relay import Relay
from router.request import Chunk, Conversation, Finished, GenerateSpec
from router.session import SessionOptions
from router.text import Tokenizer
from router.text.pieces import _byte_alphabet
from router.workers import Workers
from tests.router.fake_worker import EOS, FakeWorker

FAST = SessionOptions(first_backoff_seconds=0.01, max_backoff_seconds=0.05, hello_seconds=5.0)


def byte_tokenizer(source: str = "tests") -> Tokenizer:
    """Token i is byte i; EOS has no text."""
    return Tokenizer(_fast_byte_tokenizer(), source)


def chatty(source: str) -> Tokenizer:
    """With a chat template, which refuses a message that says no."""
    tokenizer = byte_tokenizer(source)
    tokenizer._fast.chat_template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not that') }}{% endif %}"
        "{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    return tokenizer


def save_byte_tokenizer(directory: Path) -> None:
    _fast_byte_tokenizer().save_pretrained(directory)


def _fast_byte_tokenizer() -> PreTrainedTokenizerFast:
    backend = Backend(models.BPE(vocab=dict(_byte_alphabet()), merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    assert fast.convert_tokens_to_ids("</s>") == EOS
    return fast


class FakeDirectory:
    def __init__(self) -> None:
        self.connected = True
        self.prefixes: dict[WorkerId, int] = {}
        self.lookups = 0
        self.lookup_seconds = 0.0
        self._records: list[WorkerRecord] = []
        self._changed = asyncio.Event()

    def list(self, *workers: FakeWorker) -> None:
        self.put([worker.record for worker in workers])

    def put(self, records: list[WorkerRecord]) -> None:
        self._records = records
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self) -> AsyncIterator[list[WorkerRecord]]:
        while True:
            changed = self._changed
            yield self._records
            await changed.wait()

    async def longest_prefix(
        self, hashes: Sequence[BlockHash], workers: Sequence[tuple[WorkerId, Incarnation]]
    ) -> dict[WorkerId, int]:
        self.lookups += 1
        await asyncio.sleep(self.lookup_seconds)
        return {id: count for id, count in self.prefixes.items() if id in {worker for worker, _ in workers}}


@dataclass
class System:
    relay: Relay
    workers: Workers
    directory: FakeDirectory
    metrics: Metrics
    fakes: dict[str, FakeWorker]
    _more: list[FakeWorker] = field(default_factory=list)

    def __getitem__(self, name: str) -> FakeWorker:
        return self.fakes[name]

    def value(self, name: str, **labels: str) -> float:
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    async def add(self, worker: FakeWorker) -> FakeWorker:
        self.fakes[worker.id] = worker
        self._more.append(worker)
        await worker.start()
        self.list_all()
        return worker

    def list_all(self) -> None:
        self.directory.list(*self.fakes.values())

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():
                await self.workers.wait_change(0.02)

    async def generate(self, prompt: str | tuple[int, ...] | Conversation = "hello", **changes: Any) -> Answered:
        answered = Answered()
        async for chunk in self.relay.generate(spec(prompt, **changes)):
            answered.add(chunk)
        return answered


@dataclass
class Answered:
    text: str = ""
    token_ids: tuple[int, ...] = ()
    chunks: int = 0
    last: Finished | None = None

    def add(self, chunk: Chunk) -> None:
        assert self.last is None, "a chunk came behind the last one"
        self.text += chunk.text
        self.token_ids += chunk.token_ids
        self.chunks += 1
        self.last = chunk.finished

    @property
    def finished(self) -> Finished:
        assert self.last is not None, "the stream ended without its last chunk"
        return self.last


_SAMPLING = frozenset(SamplingParams.__dataclass_fields__)


def spec(prompt: str | tuple[int, ...] | Conversation = "hello", **changes: Any) -> GenerateSpec:
    """Fields of GenerateSpec and of SamplingParams alike; greedy with seed 0 and 8 tokens unless said otherwise."""
    sampling = {"max_tokens": 8, "seed": 0} | {k: v for k, v in changes.items() if k in _SAMPLING}
    others = {k: v for k, v in changes.items() if k not in _SAMPLING}
    return GenerateSpec(prompt, SamplingParams(**sampling), **others)


def prefill(name: str = "P", **script: Any) -> FakeWorker:
    return FakeWorker(name, WorkerRole.PREFILL, **script)


def decode(name: str = "D", **script: Any) -> FakeWorker:
    return FakeWorker(name, WorkerRole.DECODE, **script)


def unified(name: str = "U", **script: Any) -> FakeWorker:
    return FakeWorker(name, WorkerRole.UNIFIED, **script)


@asynccontextmanager
async def running(
    *workers: FakeWorker,
    load_tokenizer: Callable[[str], Tokenizer] = byte_tokenizer,
    options: SessionOptions = FAST,
    **routing: Any,
) -> AsyncIterator[System]:
    """With every worker of `workers` connected. Prompts above 3 tokens go to a prefill worker."""
    directory = FakeDirectory()
    metrics = Metrics()
    router_metrics = RouterMetrics(metrics)
    config = RoutingConfig(**({"local_prefill_tokens": 3, "resume_timeout_seconds": 5.0} | routing))
    pool = Workers(directory, router_metrics, MonotonicClock(), options)
    relay = Relay(pool, config, metrics, router_metrics, load_tokenizer=load_tokenizer)
    system = System(relay, pool, directory, metrics, {worker.id: worker for worker in workers})
    for worker in workers:
        await worker.start()
    system.list_all()
    pool.start()
    relay.start()
    try:
        await system.until(lambda: len(pool.ready()) == len(workers))
        if workers:
            await relay.tokenizer()
        yield system
    finally:
        await relay.close()
        await pool.stop()
        for worker in [*workers, *system._more]:
            await worker.kill()
