"""/v1/completions: the forms of a prompt, several prompts, and every field."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from baton.errors import WorkerLost
from baton.sampling import SamplingParams
from tests.http.conftest import Served
from tests.http.fake_core import answer

PATH = "/v1/completions"


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("text", ["text"]),
        ("", [""]),
        (["one", "two"], ["one", "two"]),
        ([1, 2, 3], [(1, 2, 3)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
    ],
)
async def test_all_forms_of_a_prompt(served: Served, prompt: object, expected: list[object]) -> None:
    status, body, _ = await served.post(PATH, {"prompt": prompt})
    assert status == 200
    assert [spec.prompt for spec in served.core.specs] == expected
    choices: Any = body["choices"]
    assert [choice["index"] for choice in choices] == list(range(len(expected)))
    usage: Any = body["usage"]
    assert usage["total_tokens"] == 10 * len(expected)


async def test_what_is_left_out_is_as_openai_has_it(served: Served) -> None:
    await served.post(PATH, {"prompt": "x"})
    (spec,) = served.core.specs
    assert spec.sampling == SamplingParams(max_tokens=16, temperature=1.0)
    assert (spec.stop, spec.cache_salt, spec.add_special_tokens) == ((), b"", True)


async def test_every_field_reaches_the_core(served: Served) -> None:
    body = {
        "prompt": "x",
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 40,
        "seed": 2**63,
        "stop": ["a", "b"],
        "stop_token_ids": [5, 6],
        "ignore_eos": True,
        "cache_salt": "tenant é",
        "add_special_tokens": False,
        "user": "someone",
    }
    status, *_ = await served.post(PATH, body)
    assert status == 200
    (spec,) = served.core.specs
    assert spec.sampling == SamplingParams(
        max_tokens=9,
        min_tokens=2,
        temperature=0.0,
        top_p=0.5,
        top_k=40,
        seed=2**63,
        stop_token_ids=(5, 6),
        ignore_eos=True,
    )
    assert spec.stop == ("a", "b")
    assert spec.cache_salt == "tenant é".encode()
    assert not spec.add_special_tokens


@pytest.mark.parametrize("top_k", [-1, 0, None])
async def test_all_words_for_all_tokens(served: Served, top_k: int | None) -> None:
    await served.post(PATH, {"prompt": "x", "top_k": top_k})
    assert served.core.specs[0].sampling.top_k == 0


async def test_token_ids_come_along_when_asked_for(served: Served) -> None:
    _, body, _ = await served.post(PATH, {"prompt": "x", "return_token_ids": True})
    choices: Any = body["choices"]
    assert choices[0]["token_ids"] == [100, 101, 102]
    served.core.script = lambda spec: answer("", "é")
    events = await served.events(PATH, {"prompt": "x", "return_token_ids": True})
    assert [json.loads(event)["choices"][0]["token_ids"] for event in events[:-1]] == [[100], [101]]


async def test_several_prompts_are_streamed_side_by_side(served: Served) -> None:
    served.core.script = lambda spec: answer(f"{spec.prompt}1", f"{spec.prompt}2")
    events = await served.events(PATH, {"prompt": ["a", "b", "c"], "stream_options": {"include_usage": True}})
    assert events[-1] == "[DONE]"
    *chunks, usage = [json.loads(event) for event in events[:-1]]
    texts = {0: "", 1: "", 2: ""}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == {0: "a1a2", 1: "b1b2", 2: "c1c2"}
    assert sum(chunk["choices"][0]["finish_reason"] == "length" for chunk in chunks) == 3
    assert usage["usage"]["completion_tokens"] == 6
    assert len({spec.request_id for spec in served.core.specs}) == 3


async def test_the_first_prompt_that_fails_ends_the_others(served: Served) -> None:
    never = asyncio.Event()
    served.core.script = lambda spec: [WorkerLost("gone")] if spec.prompt == "bad" else [never]
    status, *_ = await served.post(PATH, {"prompt": ["good", "bad", "good"]})
    assert status == 503
    assert served.core.open == 0


async def test_the_framing_of_a_stream(served: Served) -> None:
    async with served.http.post(served.url + PATH, json={"prompt": "x", "stream": True}) as response:
        text = (await response.read()).decode()
        assert response.headers["Cache-Control"] == "no-cache"
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    first = json.loads(events[0].removeprefix("data: "))
    assert first["choices"] == [{"index": 0, "text": "Hello", "logprobs": None, "finish_reason": None}]
    assert "usage" not in first


async def test_an_error_in_mid_stream_ends_without_done(served: Served) -> None:
    served.core.script = lambda spec: [*answer("a", "b")[:1], WorkerLost("decode-1 is gone")]
    events = await served.events(PATH, {"prompt": "x"})
    assert len(events) == 2
    assert json.loads(events[-1]) == {
        "error": {
            "message": "decode-1 is gone",
            "type": "service_unavailable",
            "param": None,
            "code": "unavailable",
        }
    }


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("best_of", 3),
        ("logprobs", 0),
        ("echo", True),
        ("suffix", "end"),
        ("presence_penalty", 0.1),
        ("frequency_penalty", -1),
        ("repetition_penalty", 1.1),
        ("min_p", 0.1),
        ("logit_bias", {"5": -100}),
        ("response_format", {"type": "json_object"}),
        ("guided_json", {"type": "object"}),
        ("include_stop_str_in_output", True),
        ("skip_special_tokens", False),
        ("temprature", 0.1),
        ("messages", []),
    ],
)
async def test_a_field_that_would_change_the_answer_is_refused_by_name(
    served: Served, field: str, value: object
) -> None:
    status, body, _ = await served.post(PATH, {"prompt": "x", field: value})
    error: Any = body["error"]
    assert (status, error["param"], error["type"]) == (400, field, "invalid_request_error")
    assert field in error["message"]
    assert served.core.specs == []


async def test_fields_that_ask_for_nothing_are_accepted(served: Served) -> None:
    neutral = {
        "n": 1,
        "best_of": 1,
        "logprobs": None,
        "echo": False,
        "suffix": None,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "service_tier": "auto",
        "unheard_of": None,
    }
    status, *_ = await served.post(PATH, {"prompt": "x", **neutral})
    assert status == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("prompt", 5),
        ("prompt", {}),
        ("prompt", []),
        ("prompt", [[1, "a"]]),
        ("prompt", [1, "a"]),
        ("prompt", ["a", 1]),
        ("prompt", [True]),
        ("prompt", [1.5]),
        ("prompt", ["x"] * 129),
        ("prompt", None),
        ("model", 3),
        ("max_tokens", "16"),
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("temperature", "hot"),
        ("temperature", True),
        ("temperature", 10**400),
        ("top_p", []),
        ("top_k", 0.5),
        ("seed", "x"),
        ("stop", 1),
        ("stop", [1]),
        ("stop_token_ids", [1.5]),
        ("stop_token_ids", "1"),
        ("ignore_eos", 1),
        ("stream", "true"),
        ("stream_options", True),
        ("stream_options", {"include_usage": 1}),
        ("stream_options", {"x": 1}),
        ("stream_options", {"continuous_usage_stats": True}),
        ("cache_salt", 5),
        ("cache_salt", "\ud800"),
    ],
)
async def test_a_value_of_the_wrong_type_is_refused_by_name(served: Served, field: str, value: object) -> None:
    status, body, _ = await served.post(PATH, {"prompt": "x", field: value})
    error: Any = body["error"]
    assert status == 400
    assert error["param"].startswith(field)
    assert error["message"].startswith(field)
    assert served.core.specs == []


async def test_a_number_without_a_fraction_is_a_whole_number(served: Served) -> None:
    status, *_ = await served.post(PATH, {"prompt": "x", "max_tokens": 7.0})
    assert status == 200
    assert served.core.specs[0].sampling.max_tokens == 7
