"""Checks a request before any worker sees it, and fills in what it left open. Refuses with InvalidRequest.

A message says the field, its value and what would be right. What passes here can be served by every worker that has
room for it.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

from baton.errors import InvalidRequest, ModelNotFound, PromptTooLong
from baton.hashing import block_hashes, root_hash
from baton.ids import BlockHash
from baton.sampling import SamplingParams
from router.model import ModelInfo
from router.request import Conversation, GenerateSpec
from router.text.tokenizer import Tokenizer

MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 256
MAX_REQUEST_ID = 128
MAX_CACHE_SALT = 128
_HASH_IN_THREAD = 8192
"""Prompt tokens from which hashing would hold the event loop for milliseconds."""


class PromptHashes:
    """The names of a prompt's full blocks, for each block size that workers have."""

    def __init__(self, root: BlockHash, prompt_ids: tuple[int, ...]) -> None:
        self._root = root
        self._prompt_ids = prompt_ids
        self._known: dict[int, tuple[BlockHash, ...]] = {}

    async def of(self, block_size: int) -> tuple[BlockHash, ...]:
        if block_size not in self._known:
            if len(self._prompt_ids) < _HASH_IN_THREAD:
                hashes = block_hashes(self._root, self._prompt_ids, block_size)
            else:
                hashes = await asyncio.to_thread(block_hashes, self._root, self._prompt_ids, block_size)
            self._known[block_size] = tuple(hashes)
        return self._known[block_size]


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """Ready to be placed."""

    name: str
    """The client's request id, made unique: two clients may have chosen the same."""
    model: ModelInfo
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams
    """With max_tokens and seed filled in."""
    max_tokens: int
    stop: tuple[str, ...]
    cache_salt: bytes
    prompt_hashes: PromptHashes
    end_ids: frozenset[int]
    """Tokens that end the answer."""


def check_form(spec: GenerateSpec) -> None:
    """All that can be said without knowing the model."""
    if not spec.request_id:
        raise _wrong("request_id", "empty", f"1 to {MAX_REQUEST_ID} characters")
    if len(spec.request_id) > MAX_REQUEST_ID:
        raise _wrong("request_id", f"{len(spec.request_id)} characters long", f"at most {MAX_REQUEST_ID}")
    if not spec.request_id.isprintable():
        raise _wrong("request_id", repr(spec.request_id), "printable")
    if len(spec.cache_salt) > MAX_CACHE_SALT:
        raise _wrong("cache_salt", f"{len(spec.cache_salt)} bytes long", f"at most {MAX_CACHE_SALT}")
    if len(spec.stop) > MAX_STOP_STRINGS:
        raise _wrong("stop", f"{len(spec.stop)} strings", f"at most {MAX_STOP_STRINGS}")
    for stop in spec.stop:
        if not 1 <= len(stop) <= MAX_STOP_CHARACTERS:
            raise _wrong("stop", f"a string of {len(stop)} characters", f"of 1 to {MAX_STOP_CHARACTERS} each")
        try:
            stop.encode()
        except UnicodeEncodeError as error:
            raise _wrong("stop", f"text with a lone surrogate at character {error.start}", "valid Unicode") from None
    if spec.prompt in ("", ()):
        raise InvalidRequest("prompt is empty; it must have at least one token", param="prompt")
    if spec.timeout_seconds is not None and not spec.timeout_seconds >= 0:
        raise _wrong("timeout", f"{spec.timeout_seconds} s", "0 or more")


def check_model(spec: GenerateSpec, model: ModelInfo) -> None:
    if spec.model and spec.model != model.name:
        raise ModelNotFound(
            f"model {spec.model[:200]!r} is not served here; the served model is {model.name!r}", param="model"
        )
    spec.sampling.check(model.vocab_size)


async def prepare(spec: GenerateSpec, model: ModelInfo, tokenizer: Tokenizer) -> PreparedRequest:
    """`spec` has passed `check_form` and `check_model`. Raises InvalidRequest."""
    prompt_ids = await _prompt_ids(spec, model, tokenizer)
    _check_tokens(prompt_ids, model)
    left = model.max_model_len - len(prompt_ids)
    sampling = spec.sampling.with_defaults(max_tokens=left, seed=secrets.randbits(63))
    sampling.check(model.vocab_size)  # again: min_tokens may be more than the model's length leaves
    ends = frozenset() if sampling.ignore_eos else model.eos_token_ids
    assert sampling.max_tokens is not None, "with_defaults fills it in"
    return PreparedRequest(
        name=f"{spec.request_id}~{secrets.token_hex(6)}",
        model=model,
        prompt_ids=prompt_ids,
        sampling=sampling,
        max_tokens=sampling.max_tokens,
        stop=spec.stop,
        cache_salt=spec.cache_salt,
        prompt_hashes=PromptHashes(root_hash(model.model_fingerprint, salt=spec.cache_salt), prompt_ids),
        end_ids=ends | frozenset(sampling.stop_token_ids),
    )


async def _prompt_ids(spec: GenerateSpec, model: ModelInfo, tokenizer: Tokenizer) -> tuple[int, ...]:
    text, add_special_tokens = spec.prompt, spec.add_special_tokens
    if isinstance(text, Conversation):
        check_length(len(text.messages), model.max_model_len, "messages")
        text = await tokenizer.render_chat(text.messages, add_generation_prompt=text.add_generation_prompt)
        add_special_tokens = False
    if not isinstance(text, str):
        return text
    prompt_ids = await tokenizer.encode(text, add_special_tokens, max_tokens=model.max_model_len)
    if not prompt_ids:
        raise InvalidRequest("prompt has no tokens; it must have at least one", param="prompt")
    return prompt_ids


def check_length(length: int, max_model_len: int, of: str = "tokens") -> None:
    """`of`: what was counted; a message is a token at the least."""
    if length >= max_model_len:
        raise PromptTooLong(
            f"prompt has {length} {of}; the model takes {max_model_len} tokens of prompt and answer "
            f"together, so a prompt of at most {max_model_len - 1}",
            param="prompt",
        )


def _check_tokens(prompt_ids: tuple[int, ...], model: ModelInfo) -> None:
    check_length(len(prompt_ids), model.max_model_len)
    if min(prompt_ids) < 0 or max(prompt_ids) >= model.vocab_size:
        wrong = next(i for i in prompt_ids if not 0 <= i < model.vocab_size)
        raise InvalidRequest(
            f"prompt has token id {wrong}; token ids must be between 0 and {model.vocab_size - 1}", param="prompt"
        )


def _wrong(param: str, value: str, right: str) -> InvalidRequest:
    return InvalidRequest(f"{param} is {value}; it must be {right}", param=param)
