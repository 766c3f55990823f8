"""What a GPU's driver would be handed for launches of ours: for a process of its own, in which Triton does not
interpret. Compiles for a GPU that is not here, and records instead of launching.

    python -m tests.kernels.launched_again

prints a JSON object a case: whether the launch handed over what it hands over by Triton's own way, and whether Triton
was left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor

from engine.attention import Rotary
from engine.kernels.gpu import tuning
from engine.kernels.gpu.elementwise import TritonElementWise
from engine.kernels.gpu.launch import Launch, instead_of_running
from engine.kernels.gpu.linear import TritonLinear
from engine.kernels.gpu.rotary_write import rotary_write
from engine.precompile import AbsentGPU
from tests.kernels.every_launch import of_hopper

ARCH = 90


class Recorder(AbsentGPU):
    def __init__(self) -> None:
        super().__init__(ARCH)
        self.handed: list[tuple[Any, ...]] = []
        self.utils = self
        recorder = self

        class Launcher:
            def __init__(self, source: Any, metadata: Any) -> None:
                pass

            def __call__(self, *arguments: Any) -> None:
                recorder.handed.append(arguments)

        self.launcher_cls = Launcher

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[object, object, int, int, int]:
        return object(), object(), 32, 0, 1024  # module and function: each code its own

    def by_triton(self, launch: Launch) -> tuple[Any, ...]:
        launch.kernel[launch.grid](**launch.keywords(ARCH))
        return self.handed.pop()

    def by_us(self, launch: Launch) -> tuple[tuple[Any, ...], bool]:
        """What was handed over, and whether Triton looked at it."""
        asked = type(launch.kernel).run
        with mock.patch.object(type(launch.kernel), "run", autospec=True, side_effect=asked) as run:
            launch.run()
        return self.handed.pop(), run.called


def same(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """But for the hooks' metadata, which is made anew each time."""
    pairs = [pair for place, pair in enumerate(zip(one, other, strict=True)) if place != 6]
    return all(a is b or (not isinstance(a, Tensor) and a == b) for a, b in pairs)


def rotary(layer: int, num_tokens: int = 24, skew: int = 0) -> Launch:
    """`skew`: how many values the query and key heads begin behind an address that 16 divides."""
    pool, heads = torch.zeros(4, 2, 2, 2, 16, 64, dtype=torch.bfloat16), 8
    qkv = torch.zeros(num_tokens * heads * 64 + skew, dtype=torch.bfloat16)[skew:].view(num_tokens, -1)
    tokens, angles = torch.zeros(num_tokens, dtype=torch.int32), torch.zeros(num_tokens, 32)
    return rotary_write(
        qkv, pool, layer, rotary=Rotary(angles, angles), norms=None, slots=tokens, lengths=tokens,
        block_tables=torch.zeros((num_tokens, 16), dtype=torch.int32),
        query=qkv.view(num_tokens, -1, 64)[:, :4], config=tuning.config("rotary_write", "default", 64),
    )  # fmt: skip


def norms(dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    """Without what is added to the stream, and with it."""
    found: list[Launch] = []
    with instead_of_running(found.append):
        rows = torch.zeros(3, 896, dtype=dtype)
        step = TritonElementWise(1e-6).step(rows)
        step.add_norm(None, rows[0])
        step.add_norm(rows, rows[0])
    return found


def product(biased: bool) -> Launch:
    weight, x = torch.zeros(128, 256, dtype=torch.bfloat16), torch.zeros(2, 256, dtype=torch.bfloat16)
    return TritonLinear(weight, weight[:, 0].contiguous() if biased else None).launch(x, x.new_empty(2, 128))


def cases() -> Iterator[tuple[str, Launch, Launch]]:
    """The second of each pair is run behind the first."""
    yield "another layer", rotary(0), rotary(1)
    yield "more tokens", rotary(1), rotary(1, num_tokens=40)
    yield "heads elsewhere", rotary(1), rotary(1, skew=1)
    yield "and back", rotary(1, skew=1), rotary(1)
    yield "elsewhere again", rotary(1), rotary(1, skew=1)
    yield "another constant", norms()[0], norms()[1]
    yield "the first constant", norms()[1], norms()[0]
    yield "another dtype", norms()[1], norms(torch.float16)[1]
    yield "the same", norms()[1], norms()[1]
    yield "a product without bias", product(True), product(False)
    yield "the one with bias", product(False), product(True)
    first, second = ([launch for _, launch in of_hopper("default")][1] for _ in range(2))
    yield "a descriptor", first, second


def main() -> None:
    recorder = Recorder()
    triton.runtime.driver.set_active(recorder)
    with mock.patch("torch.cuda.current_device", return_value=0):
        for case, before, launch in cases():
            recorder.by_us(before)
            ours, triton_looked = recorder.by_us(launch)
            told = {"case": case, "same": same(ours, recorder.by_triton(launch)), "triton_looked": triton_looked}
            print(json.dumps(told), flush=True)


if __name__ == "__main__":
    main()
