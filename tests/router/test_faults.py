"""Workers that die, stall, fail handoffs, lie, or come late: the answer is token-exact, or the error is clear."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from baton.errors import DeadlineExceeded, InternalError, Unavailable
from baton.v1 import worker_pb2
from router.request import FinishReason
from tests.router.fake_worker import MODEL, FakeWorker, expected_tokens
from tests.router.hooks import HELLO, die_at, wait_for
from tests.router.system import FAST, Answered, System, decode, prefill, running, spec, unified


@pytest.mark.parametrize("index", [0, 1, 2, 7, 19])
async def test_a_stream_goes_on_elsewhere_when_its_decode_worker_dies(index: int) -> None:
    async with running(prefill(), decode("D1"), decode("D2")) as system:
        die_once(system, index)
        system["P"].before_token = None
        answered = await system.generate("hello", max_tokens=20)
        assert answered.token_ids == expected_tokens(HELLO, 20)
        assert answered.text == bytes(answered.token_ids).decode()
        assert answered.finished.timings.resumes == 1
        assert system.value("baton_requests_resumed_total") == 1
        survivor = system[answered.finished.decode_worker]
        (resumed,) = [submit for submit in survivor.submits if submit.id.attempt == 2]
        assert resumed.num_prompt_tokens == 5
        assert tuple(resumed.token_ids) == (HELLO + answered.token_ids)[: len(resumed.token_ids)]


def die_once(system: System, index: int) -> None:
    """The first worker that is about to report token `index` dies instead."""
    died: list[FakeWorker] = []

    async def hook(worker: FakeWorker, submit: worker_pb2.Submit, at: int) -> None:
        if at == index and not died:
            died.append(worker)
            await worker.kill()
            await asyncio.Event().wait()

    for worker in system.fakes.values():
        worker.before_token = hook


async def test_sixteen_streams_survive_the_death_of_their_decode_worker() -> None:
    async with running(prefill(), decode("D1"), decode("D2")) as system:
        die_once(system, 9)
        answers = await asyncio.gather(
            *(system.generate(f"prompt {i}", max_tokens=20, seed=i, temperature=1.0) for i in range(16))
        )
        await system.until(lambda: system.relay.open_requests == 0)
    for i, answered in enumerate(answers):
        assert answered.token_ids == expected_tokens(f"prompt {i}".encode(), 20, seed=i)


async def test_a_seed_that_the_router_drew_is_kept_by_a_resume() -> None:
    async with running(unified("U1"), unified("U2")) as system:
        die_once(system, 3)
        answered = await system.generate("hello", seed=None, temperature=1.0)
        first, second = (s for name in ("U1", "U2") for s in system[name].submits)
        assert first.sampling.seed == second.sampling.seed
        assert answered.token_ids == expected_tokens(HELLO, 8, seed=first.sampling.seed)


@pytest.mark.parametrize("survivors", [["P2"], []], ids=["another", "none"])
async def test_a_stream_survives_the_death_of_its_prefill_worker(survivors: list[str]) -> None:
    others = [prefill(name) for name in survivors]
    async with running(prefill("P1"), *others, decode()) as system:
        die_once(system, 0)
        answered = await system.generate("hello")
        assert answered.token_ids == expected_tokens(HELLO, 8)
        assert answered.finished.prefill_worker in (["P1", "P2"] if survivors else ["D"])
        assert answered.finished.timings.resumes == 1
        assert system["D"].cancels == [(system["D"].submits[0].id.request_id, 1)]


async def test_a_prefill_worker_that_dies_after_the_handoff_is_not_missed() -> None:
    go_on = asyncio.Event()
    async with running(prefill(), decode(before_token=wait_for(go_on, index=2))) as system:
        answered = Answered()
        stream = system.relay.generate(spec("hello"))
        while len(answered.token_ids) < 2:
            answered.add(await anext(stream))
        await system["P"].kill()
        await system.until(lambda: len(system.workers.ready()) == 1)
        go_on.set()
        async for chunk in stream:
            answered.add(chunk)
    assert answered.token_ids == expected_tokens(HELLO, 8)
    assert answered.finished.timings.resumes == 0
    assert answered.finished.prefill_worker == "P"


async def test_a_prefill_worker_that_dies_between_its_token_and_the_handoff_costs_a_resume() -> None:
    held = decode()
    async with running(prefill(), held) as system:
        stuck = asyncio.Event()
        held.before_handoff = stuck
        answered = Answered()
        stream = system.relay.generate(spec("hello"))
        answered.add(await anext(stream))
        assert len(answered.token_ids) == 1
        await system["P"].kill()
        async for chunk in stream:
            answered.add(chunk)
    assert answered.token_ids == expected_tokens(HELLO, 8)
    assert answered.finished.timings.resumes == 1


async def test_after_a_failed_handoff_the_decode_worker_computes_the_prompt_itself() -> None:
    async with running(prefill(), decode(failing_handoffs=1)) as system:
        answered = await system.generate("hello")
        tasks = [submit.task for submit in system["D"].submits]
        await system["P"].until(lambda: len(system["P"].cancels) == 1)  # its blocks: nobody comes for them
    assert answered.token_ids == expected_tokens(HELLO, 8)
    assert tasks == [worker_pb2.TASK_RECEIVE, worker_pb2.TASK_LOCAL]


@pytest.mark.parametrize("reason", [worker_pb2.END_REASON_UNAVAILABLE, worker_pb2.END_REASON_CANCELLED])
async def test_the_only_worker_is_asked_again_after_it_could_not(reason: int) -> None:
    async with running(unified(endings=[(reason, "full"), (reason, "full")])) as system:
        answered = await system.generate("hello")
    assert answered.token_ids == expected_tokens(HELLO, 8)
    assert answered.finished.timings.resumes == 2


async def test_a_worker_is_asked_again_as_soon_as_it_may_though_the_directory_is_slow() -> None:
    busy = unified(endings=[(worker_pb2.END_REASON_UNAVAILABLE, "full")])
    async with running(busy, resume_timeout_seconds=30.0) as system:
        system.directory.lookup_seconds = 0.3  # longer than a first exclusion
        async with asyncio.timeout(10):
            answered = await system.generate("hello")
    assert answered.token_ids == expected_tokens(HELLO, 8)


async def test_the_directory_is_not_asked_while_nobody_could_serve() -> None:
    async with running(prefill("P1"), unified(before_token=die_at(3))) as system:
        answer = asyncio.create_task(system.generate("hello"))
        await system.until(lambda: len(system.workers.ready()) == 1)
        asked = system.directory.lookups
        await system.add(prefill("P2"))
        await system.until(lambda: len(system.workers.ready()) == 2)
        assert system.directory.lookups == asked
        await system.add(unified("U"))
        assert (await answer).token_ids == expected_tokens(HELLO, 8)


async def test_a_prefill_worker_that_cannot_be_sent_to_is_the_one_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(prefill(), decode()) as system:
        (key,) = (key for key in system.workers.ready() if key.id == "P")
        session = system.workers.session(key)
        assert session is not None
        monkeypatch.setattr(session, "_options", replace(FAST, max_queued_messages=0))
        answered = await system.generate("hello")
        assert [submit.task for submit in system["D"].submits] == [worker_pb2.TASK_RECEIVE, worker_pb2.TASK_LOCAL]
    assert answered.token_ids == expected_tokens(HELLO, 8)


async def test_without_end_of_sequence_tokens_only_a_word_ends_an_answer() -> None:
    endless = worker_pb2.ModelInfo()
    endless.CopyFrom(MODEL)
    del endless.eos_token_ids[:]

    async def never_say_so(worker: FakeWorker) -> None:
        await asyncio.Event().wait()

    worker = unified(model=endless, eos_at=3, before_end=never_say_so)
    async with running(worker, resume_timeout_seconds=0.2) as system:
        stream = system.relay.generate(spec("hello"))
        tokens: list[int] = []
        while len(tokens) < 4:
            tokens += (await anext(stream)).token_ids
        await worker.kill()
        with pytest.raises(Unavailable, match="after 4 tokens"):
            await anext(stream)


async def test_a_stream_waits_for_a_worker_to_come_back() -> None:
    async with running(unified(before_token=die_at(3))) as system:
        answer = asyncio.create_task(system.generate("hello"))
        await system.until(lambda: not system.workers.ready())
        await system.add(unified("U"))
        answered = await answer
    assert answered.token_ids == expected_tokens(HELLO, 8)


async def test_a_stream_that_nobody_goes_on_with_ends_with_a_clear_error() -> None:
    async with running(prefill(), decode(before_token=die_at(3)), resume_timeout_seconds=0.2) as system:
        with pytest.raises(Unavailable, match=r"waited 0.2 s after \d tokens .* no decode .*\(D is unreachable\)$"):
            await system.generate("hello")
        assert system["D"].address in system.relay.status()[0].detail
        assert "no decode or unified worker" in system.relay.ready()


async def test_with_no_worker_at_all_the_missing_role_is_named() -> None:
    async with running(resume_timeout_seconds=0.05) as system:
        with pytest.raises(Unavailable, match="nothing is served yet: no decode or unified worker is ready"):
            await system.generate("hello")


async def test_a_deadline_passes_while_waiting_for_a_worker() -> None:
    worker = unified(before_token=wait_for(asyncio.Event(), 3))
    async with running(worker) as system:
        stream = system.relay.generate(spec("hello", timeout_seconds=2.0))
        answered = Answered()
        while len(answered.token_ids) < 3:
            answered.add(await anext(stream))
        await worker.kill()
        with pytest.raises(DeadlineExceeded, match="after 3 tokens: no decode or unified worker is ready"):
            await anext(stream)


@pytest.mark.parametrize(
    ("eos_at", "max_tokens", "reason"), [(3, 8, FinishReason.STOP), (None, 4, FinishReason.LENGTH)]
)
async def test_an_answer_whose_last_token_arrived_is_complete_though_its_worker_dies(
    eos_at: int | None, max_tokens: int, reason: FinishReason
) -> None:
    async def never_say_so(worker: FakeWorker) -> None:
        await asyncio.Event().wait()

    worker = unified(eos_at=eos_at, before_end=never_say_so)
    async with running(worker, resume_timeout_seconds=0.2) as system:
        answered = Answered()
        stream = system.relay.generate(spec("hello", max_tokens=max_tokens))
        while len(answered.token_ids) < 4:
            answered.add(await anext(stream))
        await worker.kill()
        async for chunk in stream:
            answered.add(chunk)
    assert len(answered.token_ids) == 4
    assert answered.finished.reason is reason


async def test_strangers_repeats_and_malformed_events_are_dropped_and_counted() -> None:
    async with running(prefill(noisy=True), decode(noisy=True)) as system:
        answered = await system.generate("hello")
        assert answered.token_ids == expected_tokens(HELLO, 8)
        assert system.value("baton_stale_messages_total", kind="unknown") > 10
        assert system.value("baton_stale_messages_total", kind="malformed") > 5
        assert system.value("baton_stale_messages_total", kind="ended") >= 1


async def test_a_ticket_of_another_life_is_not_forwarded() -> None:
    async with running(prefill(before_token=wait_for(asyncio.Event())), decode()) as system:
        system["P"].ticket_incarnation = 5
        with pytest.raises(DeadlineExceeded):
            await system.generate("hello", timeout_seconds=0.2)
        assert not system["D"].handoffs
        assert system.value("baton_stale_messages_total", kind="malformed") == 1


async def test_workers_that_disagree_on_a_token_are_a_defect_and_not_an_answer() -> None:
    async with running(prefill(eos_at=0), decode()) as system:
        system["P"].say_prefilled = True
        with pytest.raises(InternalError, match="disagree on token 0"):
            await system.generate("hello", ignore_eos=True)


async def test_a_worker_that_says_more_than_was_asked_for_is_cut_off() -> None:
    async with running(unified(overrun=True)) as system:
        with pytest.raises(InternalError, match="max_tokens"):
            await system.generate("hello", max_tokens=3)
