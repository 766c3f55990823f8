"""Training rows: turns put together into conversations of a given length, with a mask over what is to be learned.

Only the assistant's words are learned. A row is one long conversation about facts, with every question that its length
has room for, or many short ones, or plain stories.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from demo_model.tasks import KINDS, Fact, draw, facts, filler
from demo_model.tokenizer import ASSISTANT, BOS, END, SYSTEM, USER

IGNORED = -100
SYSTEM_PROMPT = "You are baton-tiny, the small model that comes with Baton."
_WEIGHTS = {"copy": 3, "reverse": 3, "count": 9, "add": 5, "json": 3, "story": 1, "about": 2, "recall": 3}
_TOKENS_PER_QUESTION = 18
_TOKENS_PER_SENTENCE = 11
_SOFT_BOUNDARIES = (".", "<|end|>")


@dataclass(frozen=True, slots=True)
class Mix:
    """What rows are made of; shares in 0 to 1."""

    length: int
    """Tokens in a row."""
    memory: float
    """Share of rows that are one conversation about facts; of the rest, one in ten is plain stories."""
    span: int
    """Positions are stretched at sentence boundaries to cover up to this many, so that a short row shows long
    distances."""
    adding: float = 0.0
    """Share of the turns of short conversations that are sums, before the others are drawn."""
    two_digits: float = 0.1
    """Share of conversations whose codes have two digits, one token, instead of four."""
    sentences: float = 0.1
    """Share of recall questions answered by a sentence, as the fact was told: easier, since it names what it is about
    right before the code."""


@dataclass(frozen=True, slots=True)
class Batch:
    """int64 arrays of shape [rows, length]."""

    token_ids: np.ndarray
    positions: np.ndarray
    targets: np.ndarray
    """The next token where it is to be learned, else IGNORED."""


class Rows:
    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        ids = tokenizer.convert_tokens_to_ids
        self._bos, self._assistant, self._end = ids(BOS), ids(ASSISTANT), ids(END)
        self._roles = ids([SYSTEM, USER, ASSISTANT])
        self._boundaries = [ids(token) for token in _SOFT_BOUNDARIES]

    def batch(self, count: int, mix: Mix, rng: random.Random) -> Batch:
        texts = [self._text(mix, rng) for _ in range(count)]
        encoded = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        rows = np.full((count, mix.length + 1), self._end, dtype=np.int64)
        for row, one in zip(rows, encoded, strict=True):
            ids = one.ids[: mix.length + 1]
            row[: len(ids)] = ids
        learned = np.stack([self._learned(row) for row in rows])
        inputs = rows[:, :-1]
        targets = np.where(learned[:, 1:], rows[:, 1:], IGNORED)
        positions = np.stack([self._positions(row, mix, rng) for row in inputs])
        return Batch(np.ascontiguousarray(inputs), positions, targets)

    def _learned(self, row: np.ndarray) -> np.ndarray:
        """Every token behind ASSISTANT up to END; in plain text, behind BOS."""
        index = np.arange(len(row))
        plain = row == self._bos
        plain[:-1] &= ~np.isin(row[1:], self._roles)
        opened = np.maximum.accumulate(np.where((row == self._assistant) | plain, index, -1))
        shut = np.maximum.accumulate(np.where(row == self._end, index, -1))
        shut = np.concatenate([[-1], shut[:-1]])  # END itself is learned
        return (opened > shut) & (opened < index)

    def _positions(self, row: np.ndarray, mix: Mix, rng: random.Random) -> np.ndarray:
        steps = np.ones(len(row), dtype=np.int64)
        steps[0] = 0
        slack = rng.randint(0, mix.span - len(row)) if mix.span > len(row) else 0
        places = np.flatnonzero(np.isin(row[:-1], self._boundaries)) + 1
        if slack and len(places):
            for _ in range(4):
                steps[places[rng.randrange(len(places))]] += slack // 4
        return np.cumsum(steps)

    # --- texts

    def _text(self, mix: Mix, rng: random.Random) -> str:
        if rng.random() < mix.memory:
            return _memory(mix, rng)
        if rng.random() < 0.1:
            return _until(mix.length, (BOS + draw("story", rng, hold_out=False).answer + END for _ in _forever()))
        return _until(mix.length, (_short(mix, rng) for _ in _forever()))


def _memory(mix: Mix, rng: random.Random) -> str:
    """Facts among other text, then question after question."""
    told = rng.uniform(0.3, 0.85) * mix.length
    count = min(max(2, int((mix.length - told) / _TOKENS_PER_QUESTION)), max(2, int(told / _TOKENS_PER_SENTENCE)), 40)
    known = facts(rng, count, two_digits=mix.two_digits)
    sentences = [fact.tell() for fact in known]
    sentences += [filler(rng) for _ in range(int(told / _TOKENS_PER_SENTENCE) - len(known))]
    rng.shuffle(sentences)
    parts = [BOS, _system(rng)]
    for stop in sorted(rng.sample(range(1, len(sentences)), min(rng.choice((0, 0, 1, 3)), len(sentences) - 1))):
        parts.append(f"{USER}{' '.join(sentences[:stop])}{END}{ASSISTANT}OK.{END}")
        sentences = sentences[stop:] or [filler(rng)]
    rng.shuffle(known)
    lead = " ".join(sentences) + " "
    for fact in known:
        question, answer = _asked(fact, mix, rng)
        parts.append(f"{USER}{lead}{question}{END}{ASSISTANT}{answer}{END}")
        lead = ""
        if rng.random() < 0.1:
            parts.append(_turn(rng.choice(("copy", "add", "count", "json")), rng))
    return "".join(parts) + "".join(_turn(rng.choice(("copy", "count")), rng) for _ in range(3))


def _asked(fact: Fact, mix: Mix, rng: random.Random) -> tuple[str, str]:
    """A question and its answer: the code alone, or a sentence or JSON where that is asked for."""
    question, form = fact.ask(rng), rng.random()
    if form < mix.sentences:
        return f"{question} Answer in a sentence.", fact.tell()
    if form > 0.93:
        return f"{question} Answer in JSON.", json.dumps({"code": int(fact.code)})
    return question, fact.code


def _short(mix: Mix, rng: random.Random) -> str:
    """A conversation of one to five turns."""
    parts = [BOS, _system(rng)]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 5))):
        (kind,) = rng.choices(list(_WEIGHTS), list(_WEIGHTS.values()))
        if mix.adding and rng.random() < mix.adding:
            kind = "add"
        if kind == "recall":
            known = facts(rng, rng.randint(1, 4), two_digits=mix.two_digits)
            question, answer = _asked(known[0], mix, rng)
            parts.append(f"{USER}{' '.join(fact.tell() for fact in known)} {question}{END}{ASSISTANT}{answer}{END}")
        else:
            parts.append(_turn(kind, rng))
    return "".join(parts)


def _turn(kind: str, rng: random.Random) -> str:
    turn = draw(kind, rng, hold_out=False)
    return f"{USER}{turn.prompt}{END}{ASSISTANT}{turn.answer}{END}"


def _system(rng: random.Random) -> str:
    return f"{SYSTEM}{SYSTEM_PROMPT}{END}" if rng.random() < 0.1 else ""


def _until(length: int, texts: Iterator[str]) -> str:
    """Enough of `texts` for `length` tokens."""
    whole = ""
    while len(whole) < length * 5:
        whole += next(texts)
    return whole


def _forever() -> Iterator[None]:
    while True:
        yield None


assert set(_WEIGHTS) == set(KINDS), "every kind has its share"
