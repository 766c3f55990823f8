"""The runner for devices with the kernels that it has there: all of Triton's together, beside transformers.

Where there is a GPU they run on it, with its graphs; elsewhere in Triton's interpreter, and a graph calls what it
recorded anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from baton.sampling import SamplingParams
from engine.device import Cuda, Device
from engine.device_runner import DeviceRunner
from engine.elementwise import ElementWise
from engine.kernels import choice
from engine.kernels.gpu.elementwise import TritonElementWise
from engine.loader import LoadedModel, load_model
from engine.sampler import ReferenceSampler
from engine.slots import Slots
from tests.checkpoints import FAMILIES, build_model, greedy
from tests.engine.driver import MAX_MODEL_LEN, Driver, Waiting
from tests.engine.fake_device import FakeDevice

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy, in the interpreter

_MAX_NUM_SEQS = 16
_ON_GPU = torch.cuda.is_available()


class _Calls(FakeDevice):
    def capture(self, body: Callable[[], None]) -> _Call:
        self.captures += 1
        return _Call(self, body)


class _Call:
    def __init__(self, device: FakeDevice, body: Callable[[], None]) -> None:
        self._device, self._body = device, body

    def replay(self) -> None:
        self._device.replays += 1
        self._body()


@pytest.fixture
def loaded(
    checkpoint: Callable[[str], Path], device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str], LoadedModel]:
    def triton_elementwise(_: torch.device, __: torch.dtype, ___: object, norm_eps: float) -> ElementWise:
        return TritonElementWise(norm_eps)

    if not _ON_GPU:  # where nothing else is chosen anyway, but for the models that others load on the CPU
        monkeypatch.setattr("engine.models.decoder.choose_elementwise", triton_elementwise)
    return lambda family: load_model(str(checkpoint(family)), device=device)


def _driver(model: LoadedModel, seed: int) -> Driver:
    driver = Driver(model, seed=seed, num_blocks=240)
    slots = Slots(_MAX_NUM_SEQS, MAX_MODEL_LEN, driver.cache.layout.block_size)
    kernels = choice.device_kernels(driver.cache, slots, model.spec, model.eos_token_ids)
    assert kernels is not None
    device: Device = Cuda() if _ON_GPU else _Calls()
    runner = DeviceRunner(
        model.decoder, driver.cache, slots, device=device, attention=kernels.attention, sampler=kernels.sampler
    )
    runner.warm_up(40 if _ON_GPU else 6)
    list(runner.record() if _ON_GPU else _few(runner))
    for index in range(driver.cache.num_blocks):
        driver.cache.poison(index)
    driver.runner = Waiting(runner)
    return driver


def _few(runner: DeviceRunner) -> list[tuple[int, int]]:
    """The interpreter is slow: graphs of 1, 2 and 3 rows."""
    runner._graphs.sizes = (1, 2, 3)
    return list(runner.record())


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_equal_transformers_in_mixed_batches(family: str, loaded: Callable[[str], LoadedModel]) -> None:
    model, oracle = loaded(family), build_model(family)
    prompts = [[(7 * i + 3 * j) % 300 for j in range(5 + 17 * i)] for i in range(3)]
    expected = [greedy(oracle, prompt, 4) for prompt in prompts]
    assert _driver(model, seed=3).generate(prompts, 4, preempt=True) == expected


def test_draws_are_the_reference_samplers(
    loaded: Callable[[str], LoadedModel], checkpoint: Callable[[str], Path]
) -> None:
    """With every parameter, in a batch, by graphs and without."""
    model = loaded("llama")
    sampling = [
        SamplingParams(temperature=0.9, seed=5),
        SamplingParams(temperature=1.3, top_k=12, seed=6),
        SamplingParams(temperature=0.7, top_p=0.8, seed=7),
        SamplingParams(),
    ]
    prompts = [[3 + i, 9, 40 + i] for i in range(4)]
    reference = Driver(load_model(str(checkpoint("llama"))), seed=1, num_blocks=240)
    reference.runner._sampler = ReferenceSampler(model.eos_token_ids)
    expected = reference.generate(prompts, 4, sampling)
    assert _driver(model, seed=2).generate(prompts, 4, sampling) == expected
