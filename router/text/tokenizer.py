"""A checkpoint's tokenizer: text to token ids and back, and the chat template. Never runs a checkpoint's code.

Loaded with `PreTrainedTokenizerFast`, which reads tokenizer.json as it is and imports no torch; `AutoTokenizer` imports
torch, and for some classes builds a pipeline of its own instead of the file's. Tokenising and rendering are done in a
thread, except for texts so short that the way there would take longer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NotRequired, TypedDict, TypeVar

import jinja2
from tokenizers import Tokenizer as Backend

from baton.errors import InvalidRequest, PromptTooLong
from router.text.length_bound import max_characters_per_token
from router.text.pieces import PieceTable, piece_table
from router.text.source import fast_tokenizer

T = TypeVar("T")

_THREADS = 2
_INLINE_CHARACTERS = 256
"""Tokenising so many takes about 80 µs; a trip to a thread and back takes 100."""
_TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    TypeError,
    ValueError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RecursionError,
)
"""What a template, which is a program of the checkpoint's, can end in."""


class ChatMessage(TypedDict):
    role: str
    content: str
    name: NotRequired[str]


class Tokenizer:
    """Use `load`. All properties are fixed once loaded; methods may be called from several tasks at once."""

    def __init__(self, fast: Any, source: str) -> None:
        """`fast`: a PreTrainedTokenizerFast, which this object then owns."""
        backend: Backend = fast.backend_tokenizer
        backend.no_truncation()  # tokenizer.json may ask for either; a prompt is taken as it is or refused
        backend.no_padding()
        self._fast = fast
        self._backend = backend
        self._executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="tokenizer")
        self.source = source
        added = backend.get_added_tokens_decoder()
        self.special_ids: frozenset[int] = frozenset(i for i, token in added.items() if token.special)
        """Tokens that have no text."""
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = 1 + max(vocabulary.values(), default=-1)
        """One more than the highest id. The model's own may be larger, for its tables are often padded."""
        self.pieces: PieceTable | None = piece_table(backend, self.special_ids)
        """What the detokenizer uses; None where the decoder does not work piece by piece."""
        self._characters_per_token = max_characters_per_token(backend, vocabulary)

    @classmethod
    def load(cls, source: str) -> Tokenizer:
        """From a directory or a hub id. Blocks: call it in a thread. Raises CheckpointError."""
        return cls(fast_tokenizer(source), source)

    async def encode(
        self, text: str, add_special_tokens: bool = True, *, max_tokens: int | None = None
    ) -> tuple[int, ...]:
        """Token ids of `text`; with `add_special_tokens` those that the tokenizer puts around a text, too.

        `max_tokens`: a text so long that it must be more tokens than this is refused with PromptTooLong before any
        work is done. A text that is not refused may still be longer.
        """
        bound = self._characters_per_token
        if max_tokens is not None and bound is not None and len(text) > max_tokens * bound:
            raise PromptTooLong(
                f"prompt has {len(text)} characters, which is more than {max_tokens} tokens; "
                f"prompt and answer together must fit {max_tokens} tokens",
                param="prompt",
            )

        try:
            text.encode()
        except UnicodeEncodeError as error:  # half a surrogate pair, which JSON lets through
            raise InvalidRequest(
                f"prompt has a lone surrogate at character {error.start}; it must be valid Unicode", param="prompt"
            ) from None

        def work() -> tuple[int, ...]:
            return tuple(self._backend.encode(text, add_special_tokens=add_special_tokens).ids)

        return work() if len(text) <= _INLINE_CHARACTERS else await self._in_thread(work)

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids, all at once, as the tokenizer's own decoder gives it."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    async def render_chat(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True) -> str:
        """The conversation in the words of the model's chat template, which is rendered in a sandbox. The text brings
        its special tokens: encode it with `add_special_tokens=False`. Raises InvalidRequest where the model has no
        template, or where the template refuses the conversation."""
        if not self._fast.chat_template:
            raise InvalidRequest(
                "the model has no chat template; use /v1/completions, or `text` over gRPC, or serve a checkpoint that "
                "has one",
                param="messages",
            )
        conversation = [dict(message) for message in messages]

        def work() -> str:
            rendered = self._fast.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=add_generation_prompt
            )
            assert isinstance(rendered, str), "with tokenize=False a text comes back"
            return rendered

        try:
            return await self._in_thread(work)
        except _TEMPLATE_ERRORS as error:
            raise InvalidRequest(
                f"the model's chat template does not take these messages: {error}", param="messages"
            ) from error

    def close(self) -> None:
        """Lets the threads go; work under way is finished, nobody waits for it."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)
