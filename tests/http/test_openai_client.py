"""The real openai client, synchronous and not, streaming and not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, TypeVar

import openai
import pytest

from baton.errors import DeadlineExceeded, InvalidRequest, ModelNotFound, Overloaded, PromptTooLong, WorkerLost
from router.request import FinishReason
from tests.http.conftest import Served
from tests.http.fake_core import MODEL, answer, shown

T = TypeVar("T")
USER: Any = [{"role": "user", "content": "hi"}]


async def in_thread(served: Served, call: Callable[[openai.OpenAI], T]) -> T:
    """`call` with a synchronous client, while the door's loop goes on."""

    def work() -> T:
        with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            return call(client)

    return await asyncio.to_thread(work)


async def test_a_completion(served: Served) -> None:
    done = await served.openai.completions.create(model=MODEL, prompt="Say hello", max_tokens=3)
    assert done.object == "text_completion"
    assert done.model == MODEL
    assert done.id.startswith("cmpl-")
    (choice,) = done.choices
    assert (choice.text, choice.finish_reason, choice.index) == ("Hello, world", "length", 0)
    assert done.usage is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (7, 3, 10)
    assert done.usage.prompt_tokens_details is not None
    assert done.usage.prompt_tokens_details.cached_tokens == 4
    (spec,) = served.core.specs
    assert (spec.prompt, spec.sampling.max_tokens, spec.sampling.temperature) == ("Say hello", 3, 1.0)


async def test_a_streamed_completion(served: Served) -> None:
    stream = await served.openai.completions.create(
        model=MODEL, prompt="Say hello", stream=True, stream_options={"include_usage": True}
    )
    events = [event async for event in stream]
    assert [event.choices[0].text for event in events[:-1]] == ["Hello", ", wor", "ld"]
    assert [event.choices[0].finish_reason for event in events[:-1]] == [None, None, "length"]
    assert all(event.usage is None for event in events[:-1])
    assert events[-1].choices == []
    assert events[-1].usage is not None
    assert events[-1].usage.total_tokens == 10
    assert len({event.id for event in events}) == 1


async def test_a_chat(served: Served) -> None:
    done = await served.openai.chat.completions.create(model=MODEL, messages=USER, max_completion_tokens=5)
    assert done.object == "chat.completion"
    assert done.id.startswith("chatcmpl-")
    (choice,) = done.choices
    assert (choice.message.role, choice.message.content) == ("assistant", "Hello, world")
    assert choice.finish_reason == "length"
    (spec,) = served.core.specs
    assert shown(spec) == "[user]hi[assistant]"
    assert spec.sampling.max_tokens == 5


async def test_a_streamed_chat_begins_with_the_role(served: Served) -> None:
    stream = await served.openai.chat.completions.create(
        model=MODEL, messages=USER, stream=True, stream_options={"include_usage": True}
    )
    events = [event async for event in stream]
    first, *texts, last, usage = events
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert [event.choices[0].delta.content for event in [*texts, last]] == ["Hello", ", wor", "ld"]
    assert [event.choices[0].finish_reason for event in [first, *texts]] == [None] * 3
    assert last.choices[0].finish_reason == "length"
    assert usage.usage is not None
    assert usage.usage.prompt_tokens_details is not None
    assert usage.usage.prompt_tokens_details.cached_tokens == 4
    assert all(event.object == "chat.completion.chunk" for event in events)


async def test_the_synchronous_client(served: Served) -> None:
    done = await in_thread(served, lambda client: client.completions.create(model=MODEL, prompt="x"))
    assert done.choices[0].text == "Hello, world"

    def streamed(client: openai.OpenAI) -> str:
        stream = client.chat.completions.create(model=MODEL, messages=USER, stream=True)
        return "".join(event.choices[0].delta.content or "" for event in stream)

    assert await in_thread(served, streamed) == "Hello, world"
    models = await in_thread(served, lambda client: client.models.list())
    assert [model.id for model in models.data] == [MODEL]


async def test_the_streaming_helper_assembles_the_message(served: Served) -> None:
    served.core.script = lambda spec: answer("Hello", ", world", reason=FinishReason.STOP)
    async with served.openai.chat.completions.stream(model=MODEL, messages=USER) as stream:
        async for _ in stream:
            pass
        done = await stream.get_final_completion()
    assert done.choices[0].message.content == "Hello, world"


async def test_characters_of_any_script_arrive_whole(served: Served) -> None:
    texts = ["", "你", "好", " naïve", "", " 👩‍👩‍👧", "\u2028", "\n\n", "data: x"]
    served.core.script = lambda spec: answer(*texts)
    stream = await served.openai.completions.create(model=MODEL, prompt="x", stream=True)
    got = [event.choices[0].text async for event in stream]
    assert got == [text for text in texts if text]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "raised", "code"),
    [
        (InvalidRequest("prompt is empty", param="prompt"), openai.BadRequestError, None),
        (ModelNotFound("no such model", param="model"), openai.NotFoundError, "model_not_found"),
        (PromptTooLong("600 tokens", param="prompt"), openai.BadRequestError, "context_length_exceeded"),
        (Overloaded("4096 requests are open"), openai.RateLimitError, "overloaded"),
        (WorkerLost("decode-1 is gone"), openai.InternalServerError, "unavailable"),
        (DeadlineExceeded("600 s are over"), openai.InternalServerError, "deadline_exceeded"),
        (RuntimeError("secret"), openai.InternalServerError, "internal_error"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
async def test_an_error_before_the_first_token_has_a_status_of_its_own(
    served: Served, stream: bool, error: Exception, raised: type[openai.APIStatusError], code: str | None
) -> None:
    served.core.script = lambda spec: [error]
    with pytest.raises(raised) as caught:
        await served.openai.completions.create(model=MODEL, prompt="x", stream=stream)
    assert caught.value.code == code
    assert "secret" not in str(caught.value)


async def completion_texts(served: Served) -> AsyncGenerator[str, None]:
    async for event in await served.openai.completions.create(model=MODEL, prompt="x", stream=True):
        yield event.choices[0].text


async def chat_texts(served: Served) -> AsyncGenerator[str, None]:
    async for event in await served.openai.chat.completions.create(model=MODEL, messages=USER, stream=True):
        yield event.choices[0].delta.content or ""


async def collect(texts: AsyncGenerator[str, None], into: list[str]) -> None:
    async for text in texts:
        into.append(text)  # noqa: PERF401  # what came before an error counts, too


@pytest.mark.parametrize("texts", [completion_texts, chat_texts])
async def test_an_error_in_mid_stream_is_raised_behind_the_text_so_far(
    served: Served, texts: Callable[[Served], AsyncGenerator[str, None]]
) -> None:
    served.core.script = lambda spec: [*answer("Hel", "lo")[:1], WorkerLost("decode-1 is gone")]
    got: list[str] = []
    with pytest.raises(openai.APIError, match="decode-1 is gone") as caught:
        await collect(texts(served), got)
    assert "".join(got) == "Hel"
    assert caught.value.code == "unavailable"
    assert caught.value.type == "service_unavailable"


async def test_an_error_in_mid_answer_leaves_no_half_answer(served: Served) -> None:
    served.core.script = lambda spec: [*answer("Hel", "lo")[:1], WorkerLost("decode-1 is gone")]
    with pytest.raises(openai.InternalServerError, match="decode-1 is gone"):
        await served.openai.completions.create(model=MODEL, prompt="x")


async def test_an_answer_that_breaks_off_is_an_error(served: Served) -> None:
    served.core.script = lambda spec: answer("Hel", "lo")[:1]
    with pytest.raises(openai.InternalServerError, match="broke off"):
        await served.openai.completions.create(model=MODEL, prompt="x")
    with pytest.raises(openai.APIError, match="broke off"):
        await collect(completion_texts(served), [])
    with pytest.raises(openai.InternalServerError, match="broke off"):
        await served.openai.completions.create(model=MODEL, prompt=["x", "y"])


async def test_a_stop_string_is_said(served: Served) -> None:
    served.core.script = lambda spec: answer("a", "b", reason=FinishReason.STOP, stop_string="\n")
    done = await served.openai.completions.create(model=MODEL, prompt="x", stop="\n")
    assert done.choices[0].finish_reason == "stop"
    assert done.choices[0].model_extra is not None
    assert done.choices[0].model_extra["stop_reason"] == "\n"
    assert served.core.specs[0].stop == ("\n",)


async def test_leaving_a_stream_closes_the_generation(served: Served) -> None:
    never = asyncio.Event()
    served.core.script = lambda spec: [*answer("Hel", "lo")[:1], never]
    async with await served.openai.completions.create(model=MODEL, prompt="x", stream=True) as stream:
        async for _ in stream:
            break
    await asyncio.wait_for(served.core.closed.wait(), 5)
    assert served.core.open == 0
