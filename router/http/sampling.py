"""The fields that completions and chat share: sampling, and what OpenAI's or vLLM's API has and Baton has not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from baton.sampling import SamplingParams
from router.http.body import (
    StreamOptions,
    flag,
    integer,
    json_field,
    number,
    salt,
    stream_options,
    text,
    texts,
    token_ids,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedFields:
    model: str = json_field(text, "")
    stream: bool = json_field(flag, False)
    stream_options: StreamOptions = json_field(stream_options, StreamOptions())  # noqa: RUF009  # it makes a dataclasses.field
    stop: tuple[str, ...] = json_field(texts, ())
    seed: int | None = json_field(integer, None)
    temperature: float = json_field(number, 1.0)
    top_p: float = json_field(number, 1.0)
    top_k: int = json_field(integer, 0)
    min_tokens: int = json_field(integer, 0)
    stop_token_ids: tuple[int, ...] = json_field(token_ids, ())
    ignore_eos: bool = json_field(flag, False)
    cache_salt: bytes = json_field(salt, b"")
    return_token_ids: bool = json_field(flag, False)

    def sampling(self, max_tokens: int | None) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=0 if self.top_k == -1 else self.top_k,  # vLLM's other word for all
            seed=self.seed,
            stop_token_ids=self.stop_token_ids,
            ignore_eos=self.ignore_eos,
        )


def _is(*accepted: Any) -> Callable[[Any], bool]:
    """One of these, by value; false is not 0 here."""
    return lambda value: any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in accepted)


def _empty(value: Any) -> bool:
    return value in ("", [], {})


def _anything(value: Any) -> bool:
    return True


NEUTRAL: dict[str, Callable[[Any], bool]] = {
    "n": _is(1),
    "presence_penalty": _is(0),
    "frequency_penalty": _is(0),
    "repetition_penalty": _is(1),
    "length_penalty": _is(1),
    "min_p": _is(0),
    "logit_bias": _empty,
    "use_beam_search": _is(False),
    "include_stop_str_in_output": _is(False),
    "skip_special_tokens": _is(True),
    "spaces_between_special_tokens": _is(True, False),  # special tokens are skipped, so there is nothing between
    "response_format": _is({"type": "text"}),
    "structured_outputs": _empty,
    "guided_json": _empty,
    "guided_regex": _empty,
    "guided_choice": _empty,
    "guided_grammar": _empty,
    "bad_words": _empty,
    "allowed_token_ids": _empty,
    "truncate_prompt_tokens": _is(),
    "prompt_logprobs": _is(),
    "priority": _is(0),
    "service_tier": _is("auto", "default"),
    # about the request, not the answer
    "user": _anything,
    "metadata": _anything,
    "safety_identifier": _anything,
    "prompt_cache_key": _anything,
    "store": _is(False),
}
"""What both endpoints of other servers know and Baton does not do, each with the values that change nothing."""

NEUTRAL_COMPLETIONS = NEUTRAL | {
    "best_of": _is(1),
    "echo": _is(False),
    "suffix": _empty,
    "logprobs": _is(),
}

NEUTRAL_CHAT = NEUTRAL | {
    "logprobs": _is(False),
    "top_logprobs": _is(0),
    "tools": _empty,
    "tool_choice": _is("none", "auto"),
    "parallel_tool_calls": _is(True, False),
    "functions": _empty,
    "function_call": _is("none", "auto"),
    "modalities": _is(["text"]),
    "audio": _is(),
    "prediction": _is(),
    "reasoning_effort": _is("none"),
    "verbosity": _is("medium"),
    "web_search_options": _is(),
    "echo": _is(False),
    "continue_final_message": _is(False),
    "add_special_tokens": _is(False),
    "chat_template": _is(),
    "chat_template_kwargs": _empty,
    "documents": _empty,
}
