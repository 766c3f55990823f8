"""One client with one request: asks a router by gRPC, and judges all that it gets. Its clock is the true one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import grpc

from baton.sampling import SamplingParams
from baton.v1 import inference_pb2, inference_pb2_grpc
from sim import model
from sim.router import REQUEST_TIMEOUT, address_of
from sim.scenario import RequestSpec

if TYPE_CHECKING:
    from sim.world import World

GRACE_SECONDS = 1.0
"""By which a terminal reply may come behind its deadline."""
_REASONS = {True: inference_pb2.FINISH_REASON_STOP, False: inference_pb2.FINISH_REASON_LENGTH}


class Client:
    def __init__(self, world: World, spec: RequestSpec, *, must_succeed: bool) -> None:
        """`must_succeed`: nothing goes wrong, or not any more."""
        self.spec = spec
        self.must_succeed = must_succeed
        self.ended = ""
        """How; empty while it is open."""
        self._world = world
        self._expected = model.answer(spec.prompt, spec.max_tokens)
        self._got: list[int] = []
        self._finished: inference_pb2.Finished | None = None

    @property
    def answered(self) -> bool:
        return self._finished is not None

    async def run(self) -> None:
        world, spec, loop = self._world, self.spec, self._world.loop
        await loop.pause(spec.at - loop.now)
        timeout = REQUEST_TIMEOUT if spec.timeout is None else spec.timeout
        world.trace.note(
            f"{spec.name} asks {spec.router}: {len(spec.prompt)} tokens, at most {spec.max_tokens} more, "
            f"within {timeout:.3g} s"
        )
        asking = asyncio.get_running_loop().create_task(self._ask(timeout))
        world.asked(timeout, spec.name)
        if spec.cancel_after is not None:
            loop.later(spec.cancel_after, asking.cancel)
        started = loop.now
        await asyncio.wait([asking])
        late = loop.now - started - timeout
        # A router that falls silent cannot tell of anything: its client finds out by itself. One that does not counts
        # from when the request came, and both that and what it says last may have been slow.
        allowed = GRACE_SECONDS + 2 * world.scenario.delays.longest
        if late > allowed and not world.faults.harmed(spec.router, since=started):
            world.broken(f"{spec.name} ended {late:.2f} s behind its deadline")
        if asking.cancelled():
            self._end("was cancelled by its client")
        elif (error := asking.exception()) is not None:
            self._judge_error(error, late)
        elif self._finished is None:
            world.broken(f"{spec.name} ended without a last chunk")
        else:
            self._judge_answer(self._finished)

    async def _ask(self, timeout: float) -> None:
        spec = self.spec
        request = inference_pb2.GenerateRequest(
            token_ids=inference_pb2.TokenIds(ids=spec.prompt),
            sampling=SamplingParams(max_tokens=spec.max_tokens, seed=0).to_proto(),
            request_id=spec.name,
            cache_salt=spec.salt,
        )
        channel = self._world.network.open_channel(address_of(spec.router))
        call: Any = inference_pb2_grpc.InferenceStub(channel).Generate(request, timeout=timeout)
        try:
            while (response := await call.read()) is not grpc.aio.EOF:
                self._take(response)
        finally:
            call.cancel()

    def _take(self, response: inference_pb2.GenerateResponse) -> None:
        world, name = self._world, self.spec.name
        if self._finished is not None:
            world.broken(f"{name} got a chunk behind its last one")
        at = len(self._got)
        self._got += response.token_ids
        if not at and self._got:
            world.trace.note(f"{name} gets its first token")
        if self._got != self._expected[: len(self._got)]:
            right = self._expected[at : at + len(response.token_ids)]
            world.broken(f"{name} got wrong tokens from {at} on: {list(response.token_ids)}, right is {right}")
        if response.HasField("finished"):
            self._finished = response.finished

    def _judge_answer(self, finished: inference_pb2.Finished) -> None:
        reason, cached = finished.reason, finished.usage.cached_tokens
        if self._got != self._expected:
            self._world.broken(f"{self.spec.name} ended after {len(self._got)} of {len(self._expected)} tokens")
        if reason != _REASONS[self._expected[-1] in model.EOS]:
            self._world.broken(f"{self.spec.name} ended with reason {reason}")
        # What went on elsewhere may find there what it computed itself before.
        most = self._most_cached()
        if cached > most and not (finished.timings.resumes or self._world.reached().moved):
            self._world.broken(f"{self.spec.name} found {cached} tokens cached, its tenant has had {most} of them")
        self._end(f"is answered: {len(self._got)} tokens")

    def _most_cached(self) -> int:
        """How far its prompt is in what others of its tenant have asked and been told."""
        tenant = (other for other in self._world.clients if other is not self and other.spec.salt == self.spec.salt)
        return max(
            (_common(self.spec.prompt, other.spec.prompt + tuple(other._expected)) for other in tenant), default=0
        )

    def _judge_error(self, error: BaseException, late: float) -> None:
        name, world = self.spec.name, self._world
        if not isinstance(error, grpc.aio.AioRpcError):
            world.broken(f"{name} failed: {error!r}")
            return
        code, said = error.code(), error.details()
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            if late < -1e-6 and world.scenario.clocks_agree:
                world.broken(f"{name} ran into its deadline {-late:.2f} s before it: {said}")
            if self.spec.timeout is None:
                world.broken(f"{name} was not answered long after the last fault: {said}")
        elif code is not grpc.StatusCode.UNAVAILABLE or self.must_succeed:
            world.broken(f"{name} failed with {code.name}: {said}")
        self._end(f"ends with {code.name}: {said}")

    def _end(self, how: str) -> None:
        if self.ended:
            self._world.broken(f"{self.spec.name} had two terminal replies")
        self.ended = how
        self._world.asked_no_more(self.spec.name)
        self._world.trace.note(f"{self.spec.name} {how}")


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many they begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))
