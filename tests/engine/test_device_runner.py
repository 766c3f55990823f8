"""The runner for devices that run behind the host, on a device that repeats what it has recorded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from baton.ids import BlockIndex
from baton.sampling import SamplingParams
from engine.device_runner import DeviceRunner, PendingStep
from engine.kernels import choice
from engine.kv_cache import KVCache
from engine.loader import LoadedModel, load_model
from engine.plan import Move, MoveKind, NewSequence, ScheduledSequence, StepPlan
from engine.slots import Slots
from tests.checkpoints import FAMILIES, build_model, greedy
from tests.engine.driver import MAX_MODEL_LEN, MAX_NUM_SEQS, Driver, Waiting
from tests.engine.fake_device import FakeAttention, FakeDevice, FakeSampler

BLOCK_SIZE = 4


@pytest.fixture
def loaded(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Callable[[str], LoadedModel]:
    """Of torch's operations alone: those of compiled kernels cannot be recorded."""
    monkeypatch.setattr(choice, "load_kernel", lambda: None)
    return lambda family: load_model(str(checkpoint(family)))


def _runner(
    model: LoadedModel, cache: KVCache, max_num_seqs: int = 4, max_model_len: int = 40, record: bool = True
) -> tuple[DeviceRunner, FakeDevice]:
    slots, device = Slots(max_num_seqs, max_model_len, cache.layout.block_size), FakeDevice()
    attention = FakeAttention(cache, slots.block_tables, model.spec.windows)
    runner = DeviceRunner(
        model.decoder, cache, slots, device=device, attention=attention, sampler=FakeSampler(max_num_seqs)
    )
    if record:
        *_, (done, total) = runner.record()
        assert done == total == device.captures
    return runner, device


def _blocks(*indices: int) -> tuple[BlockIndex, ...]:
    return tuple(map(BlockIndex, indices))


def _new(slot: int, tokens: list[int], blocks: tuple[BlockIndex, ...]) -> NewSequence:
    return NewSequence(slot, tuple(tokens), len(tokens), blocks, SamplingParams())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("record", [True, False])
def test_tokens_equal_transformers_in_mixed_batches(
    family: str, record: bool, loaded: Callable[[str], LoadedModel]
) -> None:
    model, oracle = loaded(family), build_model(family)
    driver = Driver(model, seed=3)
    runner, device = _runner(model, driver.cache, MAX_NUM_SEQS, MAX_MODEL_LEN, record)
    for index in range(driver.cache.num_blocks):
        driver.cache.poison(index)
    driver.runner = Waiting(runner)
    prompts = [[(7 * i + 3 * j) % 300 for j in range(5 + 9 * i)] for i in range(6)]
    expected = [greedy(oracle, prompt, 14) for prompt in prompts]
    assert driver.generate(prompts, 14, preempt=True) == expected
    assert (device.replays > 0) == record


def test_steps_are_queued_before_the_host_knows_what_those_before_drew(loaded: Callable[[str], LoadedModel]) -> None:
    """Prompt, then decodes, over the edge of a block, all queued before the first is waited for."""
    model, prompt = loaded("llama"), [5, 6, 7]
    runner, device = _runner(model, KVCache(model.kv_layout(BLOCK_SIZE), 8))
    plans = [StepPlan((_new(1, prompt, _blocks(6)),), (ScheduledSequence(1, 0, 3, (), True),))]
    for position in range(3, 11):
        blocks = _blocks({4: 7, 8: 5}[position]) if position % BLOCK_SIZE == 0 else ()
        plans.append(StepPlan((), (ScheduledSequence(1, position, 1, blocks, True),)))
    pending: list[PendingStep] = []
    drawn: list[int] = []
    for plan in plans:
        pending.append(runner.run(plan))
        if len(pending) == 2:  # as many as the engine's thread has in flight
            drawn += pending.pop(0).wait().token_ids
    drawn += pending.pop().wait().token_ids
    assert drawn == greedy(build_model("llama"), prompt, 9)
    assert device.replays == 8


def test_a_batch_larger_than_any_graph_is_run_without(loaded: Callable[[str], LoadedModel]) -> None:
    model = loaded("qwen2")
    cache = KVCache(model.kv_layout(BLOCK_SIZE), 16)
    runner, device = _runner(model, cache, record=False)
    prompts = [[9 + i] * (3 + i) for i in range(4)]
    new = tuple(_new(i, prompt, _blocks(2 * i, 2 * i + 1)) for i, prompt in enumerate(prompts))
    first = runner.run(StepPlan(new, tuple(ScheduledSequence(i, 0, 3 + i, (), True) for i in range(4))))
    second = runner.run(StepPlan((), tuple(ScheduledSequence(i, 3 + i, 1, (), True) for i in (2, 0, 3, 1))))
    expected = [greedy(build_model("qwen2"), prompt, 2) for prompt in prompts]
    assert list(first.wait().token_ids) == [tokens[0] for tokens in expected]
    assert list(second.wait().token_ids) == [expected[i][1] for i in (2, 0, 3, 1)]
    assert device.replays == 0


def test_padding_writes_nothing(loaded: Callable[[str], LoadedModel]) -> None:
    """Three streams in a graph of four."""
    model = loaded("qwen2")
    cache = KVCache(model.kv_layout(BLOCK_SIZE), 8)
    runner, device = _runner(model, cache)
    cache.tensor.fill_(float("nan"))
    new = tuple(_new(slot, [3, 4 + slot], _blocks(slot + 2)) for slot in range(3))
    runner.run(StepPlan(new, tuple(ScheduledSequence(slot, 0, 2, (), True) for slot in range(3)))).wait()
    runner.run(StepPlan((), tuple(ScheduledSequence(slot, 2, 1, (), True) for slot in range(3)))).wait()
    assert device.replays == 1
    assert not cache.tensor[2:5, :, :, :, :3].isnan().any()
    assert cache.tensor[2:5, :, :, :, 3:].isnan().all()
    assert cache.tensor[[0, 1, 5, 6, 7]].isnan().all()


def test_parameters_follow_the_slot_and_its_next_owner(loaded: Callable[[str], LoadedModel]) -> None:
    model = loaded("llama")
    runner, _ = _runner(model, KVCache(model.kv_layout(BLOCK_SIZE), 8))
    vocab = model.spec.vocab_size

    def start(seed: int) -> NewSequence:
        return NewSequence(2, (5, 6), 2, _blocks(3), SamplingParams(temperature=1.0, seed=seed))

    for seed in (4, 1000):
        runner.run(StepPlan((start(seed),), (ScheduledSequence(2, 0, 2, (), True),))).wait()
        drawn = runner.run(StepPlan((), (ScheduledSequence(2, 2, 1, (), True),))).wait()
        assert drawn.token_ids == ((31 * seed + 3) % vocab,)


def test_moves_come_before_the_rows_and_are_timed_by_the_device(loaded: Callable[[str], LoadedModel]) -> None:
    model = loaded("llama")
    cache = KVCache(model.kv_layout(BLOCK_SIZE), 4, num_swap_slots=1)
    runner, _ = _runner(model, cache)
    cache.tensor[1] = 2.0
    result = runner.run(StepPlan((), (), (Move(MoveKind.SWAP_OUT, 1, 0), Move(MoveKind.SWAP_IN, 0, 3)))).wait()
    assert result.token_ids == ()
    assert result.move_seconds > 0
    assert cache.tensor[3].eq(2.0).all()
    assert runner.run(StepPlan((), ())).wait().move_seconds == 0
