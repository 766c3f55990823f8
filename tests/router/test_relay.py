"""A request through the core, with nothing going wrong but the request itself."""

from __future__ import annotations

import asyncio

import pytest

from baton.errors import CheckpointError, DeadlineExceeded, InvalidRequest, ModelNotFound, Overloaded, Unavailable
from baton.v1 import worker_pb2
from router import loading
from router.request import Conversation, FinishReason
from router.text import ChatMessage, Tokenizer
from tests.router.fake_worker import EOS, expected_tokens
from tests.router.system import byte_tokenizer, chatty, decode, prefill, running, spec, unified

HELLO = tuple(b"hello")


async def test_a_prompt_is_prefilled_on_one_worker_and_decoded_on_another() -> None:
    async with running(prefill(cached_tokens=4), decode()) as system:
        answered = await system.generate("hello")
    assert answered.token_ids == expected_tokens(HELLO, 8)
    assert answered.text == bytes(answered.token_ids).decode()
    finished = answered.finished
    assert finished.reason is FinishReason.LENGTH
    assert (finished.prefill_worker, finished.decode_worker) == ("P", "D")
    assert (finished.usage.prompt_tokens, finished.usage.completion_tokens) == (5, 8)
    assert finished.usage.cached_tokens == 4
    assert (finished.timings.transfer_blocks, finished.timings.transfer_bytes) == (3, 300)
    assert (finished.timings.transport, finished.timings.transfer_seconds) == ("tcp", 0.5)
    assert 0 < finished.timings.first_token_seconds <= finished.timings.total_seconds
    assert finished.timings.resumes == 0


async def test_what_a_decode_worker_had_of_the_blocks_was_computed_all_the_same() -> None:
    async with running(prefill(cached_tokens=0), decode(cached_tokens=4)) as system:
        answered = await system.generate("hello")
    assert answered.finished.usage.cached_tokens == 0


async def test_prefill_seconds_hold_the_wait_for_the_prefill_worker_too() -> None:
    async with running(prefill(ticket_seconds=0.05), decode()) as system:
        timings = (await system.generate("hello")).finished.timings
    assert 0.05 <= timings.prefill_seconds <= timings.first_token_seconds


async def test_a_client_hears_nothing_of_where_a_tokenizer_is_not() -> None:
    def load(source: str) -> Tokenizer:
        raise CheckpointError("/models/secret has no tokenizer.json")

    async with running(load_tokenizer=load) as system:
        await system.add(unified())
        with pytest.raises(Unavailable, match=r"^the tokenizer could not be loaded; the router's log says why$"):
            await system.generate("hello")


async def test_both_workers_are_told_at_once_and_the_ticket_is_forwarded() -> None:
    async with running(prefill(), decode()) as system:
        await system.generate("hello", cache_salt=b"tenant", timeout_seconds=20.0)
        to_p, to_d = system["P"].submits[0], system["D"].submits[0]
        handoff = system["D"].handoffs[0]
    assert (to_p.task, to_d.task) == (worker_pb2.TASK_PREFILL, worker_pb2.TASK_RECEIVE)
    assert to_p.id == to_d.id == handoff.id
    assert handoff.ticket.worker_id == "P"
    for submit in (to_p, to_d):
        assert tuple(submit.token_ids) == HELLO
        assert submit.num_prompt_tokens == 5
        assert submit.cache_salt == b"tenant"
        assert 15 < submit.deadline_seconds <= 20


async def test_a_short_prompt_is_prefilled_where_it_is_decoded() -> None:
    async with running(prefill(), decode(cached_tokens=1)) as system:
        answered = await system.generate("abc")
        assert not system["P"].submits
        assert system["D"].submits[0].task == worker_pb2.TASK_LOCAL
    assert answered.token_ids == expected_tokens(tuple(b"abc"), 8)
    assert (answered.finished.prefill_worker, answered.finished.decode_worker) == ("D", "D")
    assert answered.finished.usage.cached_tokens == 1


@pytest.mark.parametrize("workers", [[decode()], [unified()]], ids=["no prefill worker", "unified"])
async def test_a_long_prompt_is_prefilled_locally_where_nobody_else_does_it(workers: list) -> None:
    async with running(*workers) as system:
        answered = await system.generate("a longer prompt than three tokens")
    assert answered.token_ids == expected_tokens(tuple(b"a longer prompt than three tokens"), 8)


async def test_token_ids_are_used_as_they_are() -> None:
    async with running(unified()) as system:
        answered = await system.generate((1, 2, 256))
        assert tuple(system["U"].submits[0].token_ids) == (1, 2, 256)
    assert answered.token_ids == expected_tokens((1, 2, 256), 8)


async def test_an_answer_of_one_token_ends_with_the_prefill_worker_and_is_cancelled_on_the_other() -> None:
    async with running(prefill(), decode()) as system:
        system["D"].before_token = stall
        answered = await system.generate("hello", max_tokens=1)
        await system["D"].until(lambda: len(system["D"].cancels) == 1)
    assert answered.token_ids == expected_tokens(HELLO, 1)
    assert answered.finished.reason is FinishReason.LENGTH
    assert answered.finished.decode_worker == "P"


async def test_end_of_sequence_as_first_token_ends_the_answer_at_the_prefill_worker() -> None:
    async with running(prefill(eos_at=0), decode()) as system:
        system["D"].before_token = stall
        answered = await system.generate("hello")
    assert (answered.text, answered.token_ids) == ("", (EOS,))
    assert answered.finished.reason is FinishReason.STOP


async def test_a_stop_token_is_kept_in_the_ids_and_left_out_of_the_text() -> None:
    tokens = expected_tokens(HELLO, 8)
    stop_at = next(i for i in range(2, 8) if tokens[i] not in tokens[:i])
    async with running(unified()) as system:
        # the fake ends at max_tokens; what matters is the text of a token that is a stop token
        answered = await system.generate("hello", max_tokens=stop_at + 1, stop_token_ids=(tokens[stop_at],))
    assert answered.token_ids == tokens[: stop_at + 1]
    assert answered.text == bytes(tokens[:stop_at]).decode()


async def test_a_stop_string_cuts_the_text_and_cancels_the_worker() -> None:
    tokens = expected_tokens(HELLO, 100)
    text = bytes(tokens).decode()
    async with running(unified()) as system:
        answered = await system.generate("hello", max_tokens=100, stop=(text[10:13],))
        where = text.index(text[10:13])
        assert answered.text == text[:where]
        assert answered.token_ids == tokens[: where + 3]
        assert answered.finished.reason is FinishReason.STOP
        assert answered.finished.stop_string == text[10:13]
        assert answered.finished.usage.completion_tokens == where + 3
        await system.until(lambda: system.relay.open_requests == 0)


async def test_text_that_only_began_like_a_stop_string_is_given_out_at_the_end() -> None:
    text = bytes(expected_tokens(HELLO, 8)).decode()
    async with running(unified()) as system:
        answered = await system.generate("hello", stop=(text[-2:] + "Z",))
    assert answered.text == text
    assert answered.finished.stop_string == ""


async def test_min_tokens_goes_before_stop_strings() -> None:
    text = bytes(expected_tokens(HELLO, 8)).decode()
    async with running(unified()) as system:
        answered = await system.generate("hello", min_tokens=8, stop=(text[3],))
    assert answered.text == text


async def test_max_tokens_left_open_is_what_the_models_length_leaves() -> None:
    async with running(unified()) as system:
        answered = await system.generate((1,) * 396, max_tokens=None, ignore_eos=True)
        assert system["U"].submits[0].sampling.max_tokens == 512 - 396
    assert len(answered.token_ids) == 512 - 396


async def test_a_seed_is_drawn_where_none_is_given() -> None:
    async with running(unified()) as system:
        await system.generate("hello", seed=None)
        await system.generate("hello", seed=None)
        first, second = (submit.sampling for submit in system["U"].submits)
        assert first.HasField("seed")
        assert first.seed != second.seed


async def test_a_conversation_is_rendered_by_the_models_template() -> None:
    hi = ChatMessage(role="user", content="hi")
    async with running(unified(), load_tokenizer=chatty) as system:
        await system.generate(Conversation((hi,)))
        await system.generate(Conversation((hi, hi), add_generation_prompt=False))
        prompts = [bytes(submit.token_ids).decode() for submit in system["U"].submits]
        with pytest.raises(InvalidRequest, match="chat template does not take these messages: not that"):
            await system.generate(Conversation((ChatMessage(role="user", content="no"),)))
    assert prompts == ["user:hi;>", "user:hi;user:hi;"]


async def test_a_conversation_that_is_not_admitted_is_not_rendered(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(unified(), load_tokenizer=chatty) as system:
        monkeypatch.setattr(await system.relay.tokenizer(), "render_chat", None)  # a call would be a TypeError
        await system.relay.drain(1)
        with pytest.raises(Unavailable, match="shutting down"):
            await system.generate(Conversation((ChatMessage(role="user", content="hi"),)))


async def test_equal_request_ids_do_not_meet() -> None:
    async with running(prefill(), decode()) as system:
        answers = await asyncio.gather(*(system.generate(f"prompt {i}", request_id="same") for i in range(8)))
    for i, answered in enumerate(answers):
        assert answered.token_ids == expected_tokens(f"prompt {i}".encode(), 8)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"prompt": ()}, "prompt is empty"),
        ({"prompt": (1, 257)}, "token id 257; token ids must be between 0 and 256"),
        ({"prompt": (-1,)}, "token id -1"),
        ({"prompt": (1,) * 512}, "prompt has 512 tokens; the model takes 512 .* at most 511"),
        ({"prompt": (1,) * 401}, "prompt has 401 tokens; the KV pool .* at most 400"),
        ({"prompt": "x" * 5000}, "5000"),
        ({"prompt": "\ud800"}, "lone surrogate at character 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": -1.0}, "temperature is -1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": (1,) * 390, "max_tokens": 200, "min_tokens": 150}, r"min_tokens is 150.*max_tokens \(122\)"),
        ({"stop_token_ids": (300,)}, "stop_token_ids is 300"),
        ({"stop": ("",)}, "stop is a string of 0 characters"),
        ({"stop": ("x" * 257,)}, "stop is a string of 257 characters"),
        ({"stop": tuple("abcdefghijklmnopq")}, "stop is 17 strings; it must be at most 16"),
        ({"stop": ("\udfff",)}, "lone surrogate"),
        ({"request_id": "x" * 129}, "request_id is 129 characters long"),
        ({"request_id": "a\nb"}, "printable"),
        ({"request_id": ""}, "request_id is empty"),
        ({"cache_salt": bytes(129)}, "cache_salt is 129 bytes long"),
        ({"timeout_seconds": float("nan")}, "timeout is nan"),
    ],
)
async def test_a_wrong_request_is_refused_before_any_worker_sees_it(changes: dict, says: str) -> None:
    async with running(unified()) as system:
        with pytest.raises(InvalidRequest, match=says):
            await system.generate(**changes)
        assert not system["U"].submits
        assert (await system.generate("hello")).token_ids == expected_tokens(HELLO, 8)


async def test_an_unknown_model_is_named() -> None:
    async with running(unified()) as system:
        with pytest.raises(ModelNotFound, match="'huge' is not served here; the served model is 'tiny'"):
            await system.generate("hello", model="huge")
        assert (await system.generate("hello", model="tiny")).finished


async def test_what_a_worker_refuses_reaches_the_client_in_its_words() -> None:
    async with running(unified(endings=[(worker_pb2.END_REASON_INVALID, "prompt needs 9 blocks of 8")])) as system:
        with pytest.raises(InvalidRequest, match="prompt needs 9 blocks of 8"):
            await system.generate("hello")


async def test_closing_the_stream_cancels_on_both_workers() -> None:
    async with running(prefill(before_token=stall), decode()) as system:
        stream = system.relay.generate(spec("hello"))
        waiting = asyncio.create_task(anext(stream))
        await system["D"].until(lambda: bool(system["D"].handoffs))
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
        await stream.aclose()
        for name in "PD":
            await system[name].until(lambda name=name: len(system[name].cancels) == 1)
        assert system.relay.open_requests == 0
        assert system.value("vllm:request_success_total", model_name="tiny", finished_reason="abort") == 1


async def test_a_client_that_leaves_in_mid_stream_cancels_on_the_decode_worker() -> None:
    async with running(prefill(), decode()) as system:
        system["D"].before_token = stall_at(4)
        stream = system.relay.generate(spec("hello"))
        seen = 0
        while seen < 4:
            seen += len((await anext(stream)).token_ids)
        await stream.aclose()
        await system["D"].until(lambda: len(system["D"].cancels) == 1)
        assert not system["P"].cancels  # its part was over and handed over


async def test_the_deadline_ends_the_request_and_cancels_on_both_workers() -> None:
    async with running(prefill(before_token=stall), decode()) as system:
        with pytest.raises(DeadlineExceeded, match="after 0 tokens"):
            await system.generate("hello", timeout_seconds=0.1)
        for name in "PD":
            await system[name].until(lambda name=name: len(system[name].cancels) == 1)


async def test_a_deadline_that_has_passed_already_reaches_no_worker() -> None:
    async with running(unified()) as system:
        with pytest.raises(DeadlineExceeded):
            await system.generate("hello", timeout_seconds=0.0)
        assert not system["U"].submits


async def test_too_many_open_requests_are_refused() -> None:
    async with running(unified(before_token=stall), max_waiting_requests=1) as system:
        first = asyncio.create_task(system.generate("hello"))
        await system["U"].until(lambda: bool(system["U"].submits))
        with pytest.raises(Overloaded, match="1 requests are open"):
            await system.generate("hello")
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        system["U"].before_token = None
        assert (await system.generate("hello")).finished


async def test_draining_refuses_new_requests_and_lets_open_ones_end() -> None:
    go_on = asyncio.Event()

    async def wait(*_: object) -> None:
        await go_on.wait()

    async with running(unified(before_token=wait)) as system:
        assert system.relay.ready() == ""
        first = asyncio.create_task(system.generate("hello"))
        await system["U"].until(lambda: bool(system["U"].submits))
        assert not await system.relay.drain(0.01)
        with pytest.raises(Unavailable, match="shutting down"):
            await system.generate("hello")
        go_on.set()
        assert await system.relay.drain(5)
        assert (await first).token_ids == expected_tokens(HELLO, 8)
        assert "shutting down" in system.relay.ready()


async def test_a_tokenizer_that_fails_to_load_is_tried_again_whatever_the_failure(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loading, "_RELOAD_SECONDS", 0.01)
    failures: list[Exception] = [MemoryError("/secret/path"), CheckpointError("tokenizer.json is damaged")]
    seen: list[str] = []

    def load(source: str) -> Tokenizer:
        if failures:
            raise failures.pop(0)
        return byte_tokenizer(source)

    async with running(load_tokenizer=load) as system:
        loader = system.relay._loader

        async def watch() -> None:
            while (missing := loader.missing()) or not seen:
                seen.append(missing)
                await asyncio.sleep(0)

        await system.add(unified())
        await asyncio.wait_for(watch(), 10)
        assert system.relay.ready() == ""
    assert "the tokenizer cannot be loaded; the log says why" in seen
    assert "tokenizer.json is damaged" in seen
    assert "/secret/path" in caplog.text


async def test_metrics_tell_what_a_request_felt() -> None:
    async with running(prefill(cached_tokens=4), decode()) as system:
        await system.generate("hello")
        label = {"model_name": "tiny"}
        assert system.value("vllm:time_to_first_token_seconds_count", **label) == 1
        assert system.value("vllm:e2e_request_latency_seconds_count", **label) == 1
        assert system.value("vllm:inter_token_latency_seconds_count", **label) >= 1
        assert system.value("vllm:prompt_tokens_total", **label) == 5
        assert system.value("vllm:generation_tokens_total", **label) == 8
        assert system.value("vllm:request_success_total", finished_reason="length", **label) == 1
        assert system.value("baton_actual_cached_tokens_total") == 4
        assert system.value("baton_placements_total", way="remote") == 1
        assert system.value("baton_requests_open") == 0
        assert system.value("baton_workers", role="decode", state="ready") == 1


async def stall(*_: object) -> None:
    await asyncio.Event().wait()


def stall_at(stop: int):  # type: ignore[no-untyped-def]  # a hook of FakeWorker
    async def hook(worker: object, submit: object, index: int) -> None:
        if index == stop:
            await stall()

    return hook
