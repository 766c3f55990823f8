"""Slots, warm-up and the blocks that a runner may and may not touch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from baton.ids import BlockIndex
from baton.sampling import SamplingParams
from engine.kv_cache import KVCache
from engine.loader import LoadedModel
from engine.plan import Move, MoveKind, NewSequence, ScheduledSequence, StepPlan
from engine.runner import ModelRunner
from tests.checkpoints import build_model, greedy
from tests.engine.driver import Driver

BLOCK_SIZE = 4


def _runner(model: LoadedModel, num_blocks: int = 8, max_model_len: int = 24) -> tuple[ModelRunner, KVCache]:
    cache = KVCache(model.kv_layout(BLOCK_SIZE), num_blocks, model.decoder.device)
    return ModelRunner(model.decoder, cache, max_num_seqs=2, max_model_len=max_model_len), cache


def _blocks(*indices: int) -> tuple[BlockIndex, ...]:
    return tuple(map(BlockIndex, indices))


def _new(slot: int, tokens: list[int], blocks: tuple[BlockIndex, ...], num_prompt_tokens: int = 0) -> NewSequence:
    return NewSequence(slot, tuple(tokens), num_prompt_tokens or len(tokens), blocks, SamplingParams())


def test_a_plan_with_nothing_to_compute_draws_nothing(loaded: Callable[[str], LoadedModel]) -> None:
    runner, _ = _runner(loaded("llama"))
    assert runner.run(StepPlan((), ())).token_ids == ()
    chunk = ScheduledSequence(0, 0, 2, (), sample=False)
    assert runner.run(StepPlan((_new(0, [5, 6, 7], _blocks(3)),), (chunk,))).token_ids == ()


def test_drawn_tokens_come_in_the_plans_order(loaded: Callable[[str], LoadedModel]) -> None:
    oracle, prompts = build_model("llama"), {0: [5, 6, 7], 1: [9] * 6}
    expected = {slot: greedy(oracle, prompt, 1)[0] for slot, prompt in prompts.items()}
    runner, _ = _runner(loaded("llama"))
    new = (_new(0, prompts[0], _blocks(7)), _new(1, prompts[1], _blocks(2, 0)))
    scheduled = (ScheduledSequence(1, 0, 6, (), True), ScheduledSequence(0, 0, 3, (), True))
    assert runner.run(StepPlan(new, scheduled)).token_ids == (expected[1], expected[0])


def test_only_the_scheduled_positions_are_written(loaded: Callable[[str], LoadedModel]) -> None:
    runner, cache = _runner(loaded("qwen2"))
    cache.tensor.fill_(float("nan"))
    plan = StepPlan((_new(0, list(range(6)), _blocks(5, 2)),), (ScheduledSequence(0, 0, 6, (), True),))
    runner.run(plan)
    assert not cache.tensor[5].isnan().any()
    assert not cache.tensor[2, :, :, :, :2].isnan().any()
    assert cache.tensor[2, :, :, :, 2:].isnan().all()
    assert cache.tensor[[0, 1, 3, 4, 6, 7]].isnan().all()


def test_blocks_filled_by_another_runner_serve_as_well(loaded: Callable[[str], LoadedModel]) -> None:
    """What a handoff relies on: the bytes of a block are all that its tokens' KV is."""
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    expected = greedy(build_model("mistral"), prompt, 4)
    source, source_cache = _runner(loaded("mistral"))
    first = source.run(
        StepPlan((_new(0, prompt, _blocks(6, 1, 4)),), (ScheduledSequence(0, 0, 9, (), True),))
    ).token_ids[0]
    destination, cache = _runner(loaded("mistral"))
    cache.tensor.fill_(float("nan"))
    cache.tensor[[0, 7, 3]] = source_cache.tensor[[6, 1, 4]]
    tokens = [first]
    new = (_new(1, [*prompt, first], _blocks(0, 7, 3), num_prompt_tokens=9),)
    for position in range(9, 12):
        plan = StepPlan(new, (ScheduledSequence(1, position, 1, (), True),))
        tokens += destination.run(plan).token_ids
        new = ()
    assert tokens == expected


def test_swapped_blocks_serve_as_well_wherever_they_come_back(loaded: Callable[[str], LoadedModel]) -> None:
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    model = loaded("qwen2")
    cache = KVCache(model.kv_layout(BLOCK_SIZE), 8, model.decoder.device, num_swap_slots=4)
    runner = ModelRunner(model.decoder, cache, max_num_seqs=2, max_model_len=24)
    tokens = list(
        runner.run(StepPlan((_new(0, prompt, _blocks(6, 1, 4)),), (ScheduledSequence(0, 0, 9, (), True),))).token_ids
    )
    out = [Move(MoveKind.SWAP_OUT, block, slot) for block, slot in ((6, 3), (1, 0), (4, 2))]
    assert runner.run(StepPlan((), (), tuple(out))).move_seconds > 0
    cache.tensor.fill_(float("nan"))
    moves = [Move(MoveKind.SWAP_IN, slot, block) for slot, block in ((3, 0), (0, 7), (2, 5))]
    copy = Move(MoveKind.COPY, 5, 2)
    new = (_new(1, [*prompt, *tokens], _blocks(0, 7, 2), num_prompt_tokens=9),)
    tokens += runner.run(StepPlan(new, (ScheduledSequence(1, 9, 1, (), True),), (*moves, copy))).token_ids
    assert tokens == greedy(build_model("qwen2"), prompt, 2)
    assert not cache.tensor[5, :, :, :, 1:].any(), "what was copied from is as it was"


def test_a_slot_forgets_its_last_request(loaded: Callable[[str], LoadedModel]) -> None:
    runner, _ = _runner(loaded("llama"))
    expected = greedy(build_model("llama"), [8, 9], 2)
    runner.run(StepPlan((_new(0, list(range(12)), _blocks(0, 1, 2)),), (ScheduledSequence(0, 0, 12, (), True),)))
    first = runner.run(StepPlan((_new(0, [8, 9], _blocks(3)),), (ScheduledSequence(0, 0, 2, (), True),)))
    second = runner.run(StepPlan((), (ScheduledSequence(0, 2, 1, (), True),)))
    assert [*first.token_ids, *second.token_ids] == expected


def test_the_last_token_of_a_full_slot_can_be_drawn(loaded: Callable[[str], LoadedModel]) -> None:
    prompt = list(range(24))
    runner, _ = _runner(loaded("llama"), max_model_len=24)
    plan = StepPlan((_new(0, prompt, _blocks(0, 1, 2, 3, 4, 5)),), (ScheduledSequence(0, 0, 24, (), True),))
    assert list(runner.run(plan).token_ids) == greedy(build_model("llama"), prompt, 1)


@pytest.mark.parametrize(
    "scheduled",
    [
        ScheduledSequence(0, 0, 0, (), True),
        ScheduledSequence(0, 2, 2, (), True),
        ScheduledSequence(0, 0, 2, (), True),
    ],
    ids=["nothing to compute", "tokens that are not known", "a draw that is not behind the last token"],
)
def test_plans_that_contradict_the_slots_are_caught(
    scheduled: ScheduledSequence, loaded: Callable[[str], LoadedModel]
) -> None:
    runner, _ = _runner(loaded("llama"))
    with pytest.raises(AssertionError):
        runner.run(StepPlan((_new(0, [1, 2, 3], _blocks(0)),), (scheduled,)))


def test_warm_up_leaves_the_answers_alone(loaded: Callable[[str], LoadedModel]) -> None:
    driver = Driver(loaded("llama"), num_blocks=64)
    driver.runner.warm_up(100_000)
    assert driver.generate([[5, 6, 7]], 4) == [greedy(build_model("llama"), [5, 6, 7], 4)]


def test_long_chunks_are_computed_as_short_ones(loaded: Callable[[str], LoadedModel]) -> None:
    """A CPU computes the MLP of a long chunk in slices."""
    prompt = [token % 380 for token in range(1100)]
    runner, _ = _runner(loaded("llama"), num_blocks=276, max_model_len=1101)
    blocks = tuple(map(BlockIndex, torch.randperm(276).tolist()))
    plan = StepPlan((_new(0, prompt, blocks),), (ScheduledSequence(0, 0, 1100, (), True),))
    assert list(runner.run(plan).token_ids) == greedy(build_model("llama"), prompt, 1)
