"""One client with one request: asks the router's relay as a door does, and judges every chunk that it gets."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING

from baton.errors import BatonError, DeadlineExceeded, Unavailable
from baton.sampling import SamplingParams
from router.request import Chunk, FinishReason, GenerateSpec
from sim import model
from sim.scenario import RequestSpec

if TYPE_CHECKING:
    from sim.world import World

GRACE_SECONDS = 1.0
"""By which a terminal reply may come behind its deadline."""


class Client:
    def __init__(self, world: World, spec: RequestSpec) -> None:
        self.spec = spec
        self.ended = ""
        """How; empty while it is open."""
        self._world = world
        self._expected = model.answer(spec.prompt, spec.max_tokens)
        self._got: list[int] = []
        self._finished: FinishReason | None = None

    async def run(self) -> None:
        world, spec = self._world, self.spec
        await asyncio.sleep(spec.at - world.loop.time())
        timeout = world.request_timeout if spec.timeout is None else spec.timeout
        world.trace.note(
            f"{spec.name} asks: {len(spec.prompt)} tokens, at most {spec.max_tokens} more, within {timeout:.3g} s"
        )
        asking = asyncio.get_running_loop().create_task(self._ask())
        if spec.cancel_after is not None:
            asyncio.get_running_loop().call_later(spec.cancel_after, asking.cancel)
        started = world.loop.time()
        await asyncio.wait([asking])
        late = world.loop.time() - started - timeout
        if late > GRACE_SECONDS:
            world.broken(f"{spec.name} ended {late:.2f} s behind its deadline")
        if asking.cancelled():
            self._end("was cancelled by its client")
        elif (error := asking.exception()) is not None:
            self._judge_error(error, late)
        elif self._finished is None:
            world.broken(f"{spec.name} ended without a last chunk")
        else:
            self._judge_answer(self._finished)

    async def _ask(self) -> None:
        spec = self.spec
        asked = GenerateSpec(
            spec.prompt,
            SamplingParams(max_tokens=spec.max_tokens, seed=0),
            request_id=spec.name,
            timeout_seconds=spec.timeout,
        )
        async with aclosing(self._world.relay.generate(asked)) as chunks:
            async for chunk in chunks:
                self._take(chunk)

    def _take(self, chunk: Chunk) -> None:
        world, name = self._world, self.spec.name
        if self._finished is not None:
            world.broken(f"{name} got a chunk behind its last one")
        at = len(self._got)
        self._got += chunk.token_ids
        world.trace.count(f"{name} got {chunk.token_ids}".encode())
        if self._got != self._expected[: len(self._got)]:
            right = self._expected[at : at + len(chunk.token_ids)]
            world.broken(f"{name} got wrong tokens from {at} on: {list(chunk.token_ids)}, right is {right}")
        if chunk.finished is not None:
            self._finished = chunk.finished.reason

    def _judge_answer(self, reason: FinishReason) -> None:
        stopped = self._expected[-1] in model.EOS
        if self._got != self._expected:
            self._world.broken(f"{self.spec.name} ended after {len(self._got)} of {len(self._expected)} tokens")
        if stopped is not (reason is FinishReason.STOP):
            self._world.broken(f"{self.spec.name} ended as {reason.value}")
        self._end(f"is answered: {len(self._got)} tokens, {reason.value}")

    def _judge_error(self, error: BaseException, late: float) -> None:
        name, world = self.spec.name, self._world
        said = error.message if isinstance(error, BatonError) else repr(error)
        if isinstance(error, DeadlineExceeded):
            if late < -1e-6:
                world.broken(f"{name} ran into its deadline {-late:.2f} s before it: {said}")
            if self.spec.timeout is None:
                world.broken(f"{name} was not answered long after the last fault: {said}")
        elif not isinstance(error, Unavailable) or world.scenario.is_calm:
            world.broken(f"{name} failed with {type(error).__name__}: {said}")
        self._end(f"ends with {type(error).__name__}: {said}")

    def _end(self, how: str) -> None:
        if self.ended:
            self._world.broken(f"{self.spec.name} had two terminal replies")
        self.ended = how
        self._world.asked_no_more(self.spec.name)
        self._world.trace.note(f"{self.spec.name} {how}")
