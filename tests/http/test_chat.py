"""/v1/chat/completions: messages, the template, lengths."""

from __future__ import annotations

from typing import Any

import pytest

from baton.errors import InvalidRequest
from tests.http.conftest import Served
from tests.http.fake_core import shown

PATH = "/v1/chat/completions"
USER = {"role": "user", "content": "hi"}


async def test_parts_of_text_become_one_text(served: Served) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    await served.post(PATH, {"messages": [{"role": "user", "content": parts}]})
    assert shown(served.core.specs[0]) == "[user]one\ntwo[assistant]"


async def test_roles_and_names_reach_the_template(served: Served) -> None:
    messages = [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": "b"},
        {"role": "user", "content": "c", "name": "Ada"},
        {"role": "assistant", "content": None, "tool_calls": [], "refusal": None},
        {"role": "user", "content": "d"},
    ]
    status, *_ = await served.post(PATH, {"messages": messages})
    assert status == 200
    assert shown(served.core.specs[0]) == "[system]a[system]b[user]c[assistant][user]d[assistant]"
    assert served.core.specs[0].prompt.messages[2]["name"] == "Ada"


async def test_the_generation_prompt_can_be_left_out(served: Served) -> None:
    await served.post(PATH, {"messages": [USER], "add_generation_prompt": False})
    assert shown(served.core.specs[0]) == "[user]hi"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 4),
    ],
)
async def test_the_length_is_what_is_asked_or_what_the_model_leaves(
    served: Served, given: dict[str, int], expected: int | None
) -> None:
    await served.post(PATH, {"messages": [USER], **given})
    assert served.core.specs[0].sampling.max_tokens == expected


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ("hi", "messages is the string"),
        ([], "at least one message"),
        (None, "messages is missing"),
        (["hi"], r"messages\[0\] is the string"),
        ([{"content": "hi"}], r"messages\[0\]\.role is null"),
        ([{"role": "robot", "content": "hi"}], "must be one of system"),
        ([{"role": ["user"], "content": "hi"}], "role is a list"),
        ([{"role": "tool", "content": "hi"}], "must be one of system"),
        ([USER, {"role": "user"}], r"messages\[1\]\.content is null"),
        ([{"role": "user", "content": 5}], "content is 5"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], '"image_url"'),
        ([{"role": "user", "content": ["hi"]}], r"content\[0\] is of type the string"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}], "tool_calls is not supported"),
        ([{"role": "user", "content": "hi", "name": 3}], "name is 3"),
    ],
)
async def test_messages_that_cannot_be_taken_are_refused(served: Served, messages: object, said: str) -> None:
    status, body, _ = await served.post(PATH, {"messages": messages})
    error: Any = body["error"]
    assert status == 400
    assert error["param"].startswith("messages")
    with pytest.raises(InvalidRequest, match=said):
        raise InvalidRequest(error["message"])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("response_format", {"type": "json_schema"}),
        ("logprobs", True),
        ("top_logprobs", 3),
        ("n", 2),
        ("reasoning_effort", "high"),
        ("modalities", ["audio"]),
        ("chat_template_kwargs", {"enable_thinking": False}),
        ("prompt", "x"),
    ],
)
async def test_a_field_that_would_change_the_answer_is_refused_by_name(
    served: Served, field: str, value: object
) -> None:
    status, body, _ = await served.post(PATH, {"messages": [USER], field: value})
    error: Any = body["error"]
    assert (status, error["param"]) == (400, field)


async def test_fields_that_ask_for_nothing_are_accepted(served: Served) -> None:
    neutral = {"tools": [], "tool_choice": "auto", "logprobs": False, "top_logprobs": 0, "modalities": ["text"]}
    status, *_ = await served.post(PATH, {"messages": [USER], **neutral})
    assert status == 200
